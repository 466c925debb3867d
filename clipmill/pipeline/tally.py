"""Sums over the committed units of a run, for the failure budget, the summary and the manifests.

Commit records are authoritative but large, because each lists all videos of its unit. Their digests (counts, labels,
failures, shards) are therefore kept in segments, ``clips/tally/000001.json``, which are created once and never changed.
A driver writes a segment after every `SEGMENT_UNITS` units and one at its end. A resumed run lists the commit records,
reads the segments, and reads only the records that no segment covers: at most `SEGMENT_UNITS` after a kill. Freezing
reads no records.

A segment that counts a unit without a commit record is invalid: it is removed, and its other records are read again.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.pipeline.digest import digest
from clipmill.pipeline.plan import Plan
from clipmill.shards.commits import ShardEntry, committed_units, read_commit, read_commits
from clipmill.shards.manifest import SPLITS

__all__ = ["SEGMENT_UNITS", "SplitCounts", "Tally", "publish_tally", "read_tally"]

SCHEMA = 3
SEGMENT_UNITS = 1000
_READERS = 16
_SEGMENT_NAME = re.compile(r"(\d{6,9})\.json")

logger = logging.getLogger(__name__)


@dataclass
class SplitCounts:
    """Sums over the committed units of a split. All are integers, so the order of summing does not matter."""

    num_videos: int = 0
    num_clips: int = 0
    num_short: int = 0
    num_static: int = 0
    num_black: int = 0
    num_truncated: int = 0
    num_filtered: int = 0
    num_damaged_frames: int = 0
    num_joins: int = 0
    num_with_actions: int = 0
    num_excluded: int = 0
    num_values: int = 0
    pixel_sum: int = 0
    pixel_square_sum: int = 0
    num_measured_clips: int = 0
    num_measured_values: int = 0
    squared_error: int = 0

    def pixel_moments(self) -> tuple[float | None, float | None]:
        """Mean and variance of x / 255 - 0.5 over all uint8 values x, exact up to the final rounding."""
        if not self.num_values:
            return None, None
        mean = Fraction(self.pixel_sum, self.num_values)
        variance = Fraction(self.pixel_square_sum, self.num_values) - mean**2
        return float(mean / 255 - Fraction(1, 2)), float(variance / 255**2)


@dataclass
class Tally:
    """Sums over the finished units of earlier runs and of this one."""

    splits: dict[str, SplitCounts] = field(default_factory=lambda: {split: SplitCounts() for split in SPLITS})
    labels: Counter[str] = field(default_factory=Counter)
    exclusions: list[dict[str, Any]] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    parts: dict[str, dict[int, tuple[ShardEntry, ...]]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    """The shards of each counted unit, by split and number."""
    unpublished: list[dict[str, Any]] = field(default_factory=list)
    """Digests that no segment has yet."""
    num_segments: int = 0
    """Number of the newest segment."""

    def add(self, unit: dict[str, Any], *, is_published: bool = False) -> None:
        """Adds one unit's `digest`."""
        if not is_published:
            self.unpublished.append(unit)
        counts = self.splits[unit["split"]]
        for name, number in unit["counts"].items():
            setattr(counts, name, getattr(counts, name) + number)
        self.labels.update(unit["labels"])
        self.exclusions += unit["exclusions"]
        self.versions.add(json.dumps(unit["versions"], sort_keys=True))
        self.parts[unit["split"]][unit["unit"]] = tuple(map(ShardEntry.parse, unit["parts"]))

    def drop_retried(self, plan: Plan) -> None:
        """Drops the failures of videos that a later generation tries again, because they are counted there."""
        kept = []
        for exclusion in self.exclusions:
            if plan.is_retried(exclusion["id"], exclusion["unit"]):
                self.splits[exclusion["split"]].num_videos -= 1
                self.splits[exclusion["split"]].num_excluded -= 1
            else:
                kept.append(exclusion)
        self.exclusions = kept

    @property
    def num_units(self) -> int:
        """Units counted, of both splits."""
        return sum(map(len, self.parts.values()))

    def total(self, name: str) -> int:
        """A count over both splits."""
        return sum(getattr(counts, name) for counts in self.splits.values())

    def quarantine(self) -> bytes:
        """The excluded videos as JSON lines, in the order of the plan."""
        ordered = sorted(self.exclusions, key=lambda exclusion: (exclusion["split"], exclusion["id"]))
        return b"".join(json.dumps(exclusion, sort_keys=True).encode() + b"\n" for exclusion in ordered)


def read_tally(config: RunConfig, plan: Plan, damaged: Mapping[str, Collection[int]] | None = None) -> Tally:
    """Sums over the committed units of all generations of the plan. The caller holds the lease.

    Args:
        config: config of the run.
        plan: plan of the run.
        damaged: units, by split, whose commit records may be unreadable; such a unit counts as not committed.

    Raises:
        UserError: another commit record is unreadable.
    """
    committed = {
        split: set(committed_units(config.folder("clips", split))) & set(range(plan.num_units(split)))
        for split in SPLITS
    }
    for split, suspects in (damaged or {}).items():
        committed[split] -= {unit for unit in suspects if not _is_readable(config.folder("clips", split), unit)}
    tally = Tally()
    for number, url, units in _segments(config):
        tally.num_segments = max(tally.num_segments, number)
        if units is None:
            logger.warning("%s is damaged: its commit records are read again", url)
        elif all(unit["unit"] in committed[unit["split"]] for unit in units):
            for unit in units:
                if unit["unit"] not in tally.parts[unit["split"]]:  # a run that lost its lease may have written it too
                    tally.add(unit, is_published=True)
        else:
            logger.warning("%s counts a unit without a commit record: its other records are read again", url)
            storage.remove(url)
    for split in SPLITS:
        url = config.folder("clips", split)
        for record in read_commits(url, sorted(committed[split] - tally.parts[split].keys())):
            unit = digest(record)
            if not _is_digest(unit):
                raise UserError(f"the commit record of unit {record['unit']} in {url} is damaged; restore or remove it")
            tally.add(unit)
    tally.drop_retried(plan)
    return tally


def _is_readable(url: str, unit: int) -> bool:
    try:
        return _is_digest(digest(read_commit(url, unit)))
    except (FileNotFoundError, UserError, KeyError, TypeError, AttributeError):
        return False


def publish_tally(config: RunConfig, tally: Tally) -> None:
    """Writes the unpublished digests as a segment. The bytes do not depend on the order in which the units finished."""
    if not tally.unpublished:
        return
    units = sorted(tally.unpublished, key=lambda unit: (unit["split"], unit["unit"]))
    is_ours = False
    while not is_ours:
        tally.num_segments += 1
        url = config.folder("clips", "tally", f"{tally.num_segments:06d}.json")
        is_ours = storage.create_document(url, {"units": units}, SCHEMA)
    tally.unpublished.clear()


def _segments(config: RunConfig) -> Iterator[tuple[int, str, list[dict[str, Any]] | None]]:
    """Number, URL and digests of each segment. A damaged segment gives None, because segments only save time."""
    url = config.folder("clips", "tally")
    names = [found for entry in storage.list_folder(url) if (found := _SEGMENT_NAME.fullmatch(entry.name))]

    def read(name: re.Match[str]) -> tuple[int, str, list[dict[str, Any]] | None]:
        segment_url = storage.join(url, name[0])
        try:
            units = storage.read_document(segment_url, SCHEMA)["units"]
            return int(name[1]), segment_url, units if all(map(_is_digest, units)) else None
        except (UserError, KeyError, TypeError):
            return int(name[1]), segment_url, None

    with ThreadPoolExecutor(_READERS) as readers:
        for first in range(0, len(names), _READERS):
            yield from readers.map(read, names[first : first + _READERS])


def _is_digest(unit: Any) -> bool:
    """Whether this has the fields of a `digest` that summing needs."""
    try:
        tuple(map(ShardEntry.parse, unit["parts"]))
        return (
            unit["split"] in SPLITS
            and type(unit["unit"]) is int
            and unit["counts"].keys() == {count.name for count in fields(SplitCounts)}
            and all(type(number) is int for number in [*unit["counts"].values(), *unit["labels"].values()])
            and all(isinstance(exclusion, Mapping) for exclusion in unit["exclusions"])
            and isinstance(unit["versions"], Mapping)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
