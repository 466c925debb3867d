"""What sharding skipped, by cause: quarantined videos, and parts of the others."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from clipmill import storage
from clipmill.shards.commits import read_commits
from clipmill.shards.manifest import SPLITS, Manifest

__all__ = ["Skipped", "skipped_of"]

MOST_NAMED = 20
"""Maximum number of videos that are named for each cause."""
MOST_UNITS = 64
"""Maximum number of commit records per split that are searched for names. Each lists all videos of its unit."""

_COUNTED = {
    "num_short": ("short", "videos", "shorter than a clip"),
    "num_filtered": ("filtered", "videos", "outside a bound of data.clip"),
    "num_truncated": (
        "truncated",
        "videos",
        "end before the time that their container states; their good clips are kept",
    ),
    "num_static_clips": ("static", "clips", "nothing moves (data.clip.min_motion)"),
    "num_black_clips": ("black", "clips", "dark (data.clip.min_brightness)"),
    "num_damaged_frames": ("damaged_frames", "frames", "damaged, with those that refer to them"),
    "num_joins": ("joins", "joins", "two recordings in one file: no clip spans them"),
}
"""By fact of the manifest: its key in a commit record, what is counted, and why it was skipped."""


@dataclass
class Skipped:
    """A cause, and what was skipped for it."""

    cause: str
    unit: str
    """What ``count`` counts."""
    count: int
    names: list[str] = field(default_factory=list)
    """Names of the first videos with this cause."""


def skipped_of(clips_url: str, manifests: dict[str, Manifest]) -> list[Skipped]:
    """Everything that sharding skipped, by cause, quarantined videos first.

    Args:
        clips_url: the folder ``clips`` of a run.
        manifests: of its splits.
    """
    return [*_quarantined(clips_url), *_counted(manifests)]


def _quarantined(clips_url: str) -> list[Skipped]:
    """The lines of ``quarantine.jsonl``, by cause."""
    try:
        lines = storage.read_bytes(storage.join(clips_url, "quarantine.jsonl")).splitlines()
    except FileNotFoundError:
        return []
    by_cause: defaultdict[str, list[str]] = defaultdict(list)
    for line in lines:
        record = json.loads(line)
        by_cause[f"{record['stage']}: {record['cause']}"].append(record["url"])
    return [
        Skipped(f"quarantined, {cause}", "videos", len(names), names[:MOST_NAMED])
        for cause, names in sorted(by_cause.items(), key=lambda item: -len(item[1]))
    ]


def _counted(manifests: dict[str, Manifest]) -> list[Skipped]:
    found = {}
    for fact, (key, unit, why) in _COUNTED.items():
        count = sum(manifest.facts.get(fact) or 0 for manifest in manifests.values())
        if count:
            found[key] = Skipped(why, unit, count)
    duplicates = max((manifest.facts.get("num_duplicates") or 0 for manifest in manifests.values()), default=0)
    if found:
        for split in SPLITS:
            if split in manifests:
                _name_videos(manifests[split], found)
    copies = [Skipped("copies of a video that is there", "videos", duplicates)] if duplicates else []
    return [*found.values(), *copies]


def _name_videos(manifest: Manifest, found: dict[str, Skipped]) -> None:
    """Adds names of videos to each cause."""
    for record in read_commits(manifest.url, list(islice(manifest.units(), MOST_UNITS))):
        for video in record["videos"]:
            for key, skipped in found.items():
                if video[key] and len(skipped.names) < MOST_NAMED:
                    skipped.names.append(_name(video, key))


def _name(video: dict[str, Any], key: str) -> str:
    """Name of a video, with the bound that it violates, or the number of its skipped clips or frames."""
    value = video[key]
    return video["url"] if value is True else f"{video['url']} ({value})"
