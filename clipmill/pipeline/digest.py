"""The digest of a commit record that the driver keeps. Its size does not grow with the number of videos."""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["digest"]

_OF_VIDEOS = {
    "num_clips": lambda video: video["clips"],
    "num_static": lambda video: video["static"],
    "num_black": lambda video: video["black"],
    "num_truncated": lambda video: video["truncated"],
    "num_filtered": lambda video: video["filtered"] is not None,
    "num_damaged_frames": lambda video: video["damaged_frames"],
    "num_joins": lambda video: video["joins"],
    "num_with_actions": lambda video: video["actions"],
}
_OF_PIXELS = ("num_values", "pixel_sum", "pixel_square_sum")
_OF_ENCODING = ("num_measured_clips", "num_measured_values", "squared_error")


def digest(record: dict[str, Any]) -> dict[str, Any]:
    """The counts, labels, exclusions and shards of one unit, from its commit record.

    Counts are integers, so the order in which units are summed does not matter.
    """
    labels: Counter[str] = Counter()
    for video in record["videos"]:
        if video["label"] is not None and video["clips"]:
            labels[video["label"]] += video["clips"]
    sums = record["pixels"] | record["encoding"]
    return {
        "split": record["split"],
        "unit": record["unit"],
        "parts": record["parts"],
        "counts": {
            "num_videos": len(record["videos"]) + len(record["exclusions"]),
            "num_excluded": len(record["exclusions"]),
            "num_short": record["num_short"],
            **{name: sum(int(count(video)) for video in record["videos"]) for name, count in _OF_VIDEOS.items()},
            **{name: sums[name] for name in (*_OF_PIXELS, *_OF_ENCODING)},
        },
        "labels": dict(labels),
        "exclusions": [
            {"split": record["split"], "unit": record["unit"], **exclusion} for exclusion in record["exclusions"]
        ],
        "versions": record["versions"],
    }
