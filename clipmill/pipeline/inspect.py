"""Describes a data set: counts, classes, durations, and a contact sheet."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.commits import committed_units, read_commits
from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.manifest import Manifest
from clipmill.video.pictures import contact_sheet

__all__ = ["inspect"]

SHEET_CLIPS = 16


def inspect(url: str) -> dict[str, Any]:
    """Describes one frozen split of clips (such as ``runs/demo/clips/train``), or a set of samples.

    Returns:
        ``clips`` or ``samples``, ``shards``, ``bytes``, ``fingerprint``, ``recipe``; ``contact_sheet``, a PNG of up to
        `SHEET_CLIPS` clips spread evenly over the split, or None if it is empty. For clips also ``videos``; ``classes``
        {label: clips} (clips without a label under ``"-"``); ``video_seconds`` {min, median, max, total} over the
        videos that state a duration; ``excluded`` [{url, cause}].

    Raises:
        UserError: there is no manifest of clips or samples.
    """
    url = storage.absolute(url)
    try:
        manifest = Manifest.load(url)
    except FileNotFoundError as error:
        raise UserError(
            f"{url} holds no finished clips; name a split of a run, such as runs/demo/clips/train"
        ) from error
    if manifest.kind == "tokens":
        raise UserError(f"{url} holds tokens, which cannot be shown as pictures; name a folder of clips or samples")
    sheet = _sheet(manifest) if manifest.num_samples else None
    return _common(manifest) | (_of_videos(manifest) if manifest.kind == "clips" else {}) | {"contact_sheet": sheet}


def _common(manifest: Manifest) -> dict[str, Any]:
    """The facts that clips and samples share."""
    return {
        manifest.kind: manifest.num_samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "fingerprint": manifest.fingerprint,
        "recipe": manifest.recipe,
    }


def _of_videos(manifest: Manifest) -> dict[str, Any]:
    """The facts about a split's videos, from the commit records."""
    classes: Counter[str] = Counter()
    durations: list[float] = []
    excluded: dict[str, dict[str, Any]] = {}
    for record in read_commits(manifest.url, committed_units(manifest.url)):
        # Units ascend, so a retried video's latest result wins.
        excluded |= {video["id"]: {"url": video["url"], "cause": video["cause"]} for video in record["exclusions"]}
        for video in record["videos"]:
            excluded.pop(video["id"], None)
            classes[video["label"] or "-"] += video["clips"]
            if video["info"]["duration_seconds"] is not None:
                durations.append(video["info"]["duration_seconds"])
    return {
        "videos": manifest.facts["num_videos"],
        "classes": dict(sorted(classes.items())),
        "video_seconds": _spread(durations),
        "excluded": list(excluded.values()),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values), "total": sum(values)}


def _sheet(manifest: Manifest) -> bytes:
    chosen = np.unique(np.linspace(0, manifest.num_samples - 1, SHEET_CLIPS).astype(np.int64))
    dataset = ShardDataset(manifest, decode_clip)
    return contact_sheet(np.stack([dataset[int(index)]["video"] for index in chosen]))
