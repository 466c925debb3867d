"""Files beside the manifest for other people's readers; none of ours reads them.

In a data set's folder: ``shards.txt`` (the tars' names, one a line, for webdataset) and ``wids.json`` (shard list of
``wids``, which webdataset 0.2 carries: ``__kind__`` wids-shard-index-v1). In the folder above the splits: ``.nv-meta``,
which makes both one data set for Megatron-Energon (``.info.json``, ``split.yaml``, ``dataset.yaml``, as its release 7.4
reads them). Its own index of a shard, ``NAME.tar.idx``, is the one that we write anyway.
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
    """Writes ``.nv-meta`` above the splits of a data set; where it is right already nothing is written.

    Samples come as Energon's "crude" ones, dicts of their members' bytes, for the user's cooker to decode. The list of
    excluded samples is empty: a quarantined video never gets into a shard.

    Args:
        url: the folder that the splits lie in.
        splits: by the name of their folders.
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
    """Writes an object unless it holds just that already."""
    if not storage.exists(url) or storage.read_bytes(url) != content:
        storage.publish_bytes(url, content)
