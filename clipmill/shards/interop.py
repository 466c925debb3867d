"""Shard lists for the readers of other projects; clipmill itself does not read them.

In a data set's folder: ``shards.txt`` (names of the tars, one per line, for webdataset) and ``wids.json`` (shard list
of ``wids``, part of webdataset 0.2: ``__kind__`` wids-shard-index-v1). In the folder above the splits: ``.nv-meta``,
which presents both splits as one data set to Megatron-Energon (``.info.json``, ``split.yaml``, ``dataset.yaml``, as
release 7.4 reads them). Energon's index of a shard, ``NAME.tar.idx``, is the same file as clipmill's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import yaml

from clipmill import storage
from clipmill.shards.manifest import Manifest

__all__ = ["publish_changed", "publish_energon", "shard_lists"]


def shard_lists(manifest: Manifest) -> dict[str, bytes]:
    """``shards.txt`` and ``wids.json`` of a data set, by name."""
    wids = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": manifest.fingerprint[:16],
        "shardlist": [
            {"url": shard.name, "nsamples": shard.samples, "filesize": shard.bytes} for shard in manifest.shards
        ],
    }
    return {
        "shards.txt": "".join(f"{shard.name}\n" for shard in manifest.shards).encode(),
        "wids.json": (json.dumps(wids, indent=1) + "\n").encode(),
    }


def publish_energon(url: str, splits: Mapping[str, Manifest]) -> None:
    """Writes ``.nv-meta`` above the splits of a data set. Files that are right already are not written again.

    Energon gets "crude" samples: dicts of their members' bytes, which the user's cooker decodes. The list of excluded
    samples is empty, because a quarantined video never gets into a shard.

    Args:
        url: the folder of the splits.
        splits: manifests by the name of their folder.
    """
    names = {
        split: [f"{split}/{shard.name}" for shard in manifest.shards if shard.samples]
        for split, manifest in splits.items()
    }
    counts = {f"{split}/{shard.name}": shard.samples for split, manifest in splits.items() for shard in manifest.shards}
    documents = {
        ".info.json": json.dumps({"shard_counts": counts}, indent=1) + "\n",
        "split.yaml": yaml.safe_dump({"split_parts": names, "exclude": []}, sort_keys=False),
        "dataset.yaml": yaml.safe_dump(
            {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}, sort_keys=False
        ),
    }
    for name, text in documents.items():
        publish_changed(storage.join(url, ".nv-meta", name), text.encode())


def publish_changed(url: str, content: bytes) -> None:
    """Writes an object unless it has this content already."""
    if not storage.exists(url) or storage.read_bytes(url) != content:
        storage.publish_bytes(url, content)
