"""What the committed units of a run amount to: the sums that budget, summary and manifests need.

Commit records are the truth. Reading 100,000 of them from a bucket would take minutes, so ``clips/tally.json`` keeps
their sums beside the numbers of the units that are in them: a resumed run lists the records and reads those that it
does not know. A tally that knows a unit which has no record any more is not believed, and all records are read again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.pipeline.plan import Plan
from clipmill.pipeline.unit import digest
from clipmill.shards.manifest import SPLITS, committed_units, read_commits

__all__ = ["SplitCounts", "Tally", "publish_tally", "read_tally"]

SCHEMA = 2

logger = logging.getLogger(__name__)


@dataclass
class SplitCounts:
    """Sums over the committed units of a split. All integers, so their order does not matter."""

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
    """What the finished units amount to, from earlier runs and from this one."""

    splits: dict[str, SplitCounts] = field(default_factory=lambda: {split: SplitCounts() for split in SPLITS})
    labels: Counter[str] = field(default_factory=Counter)
    exclusions: list[dict[str, Any]] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    committed: dict[str, set[int]] = field(default_factory=lambda: {split: set() for split in SPLITS})

    def add(self, unit: dict[str, Any]) -> None:
        """Adds one unit's `digest`."""
        counts = self.splits[unit["split"]]
        for name, number in unit["counts"].items():
            setattr(counts, name, getattr(counts, name) + number)
        self.labels.update(unit["labels"])
        self.exclusions += unit["exclusions"]
        self.versions.add(json.dumps(unit["versions"], sort_keys=True))
        self.committed[unit["split"]].add(unit["unit"])

    def leave_out_retried(self, plan: Plan) -> None:
        """Forgets the failures of videos that a later generation tries again: they count there."""
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
        return sum(map(len, self.committed.values()))

    def total(self, name: str) -> int:
        """A count over both splits."""
        return sum(getattr(counts, name) for counts in self.splits.values())

    def quarantine(self) -> bytes:
        """The excluded videos as JSON lines, in the order of the plan."""
        ordered = sorted(self.exclusions, key=lambda exclusion: (exclusion["split"], exclusion["id"]))
        return b"".join(json.dumps(exclusion, sort_keys=True).encode() + b"\n" for exclusion in ordered)


def read_tally(config: RunConfig, plan: Plan) -> Tally:
    """What is committed, of all generations of the plan."""
    committed = {
        split: set(committed_units(config.folder("clips", split))) & set(range(plan.num_units(split)))
        for split in SPLITS
    }
    tally = _published(config)
    if any(tally.committed[split] - committed[split] for split in SPLITS):
        logger.warning("%s counts units without a commit record: all records are read again", _url(config))
        tally = Tally()
    for split in SPLITS:
        for record in read_commits(config.folder("clips", split), sorted(committed[split] - tally.committed[split])):
            tally.add(digest(record))
    tally.leave_out_retried(plan)
    return tally


def publish_tally(config: RunConfig, tally: Tally) -> None:
    """Writes ``clips/tally.json``; the same sums are the same bytes, in whichever order the units came."""
    if not tally.num_units:
        return
    document = {
        "splits": {split: asdict(counts) for split, counts in tally.splits.items()},
        "labels": tally.labels,
        "exclusions": sorted(tally.exclusions, key=lambda exclusion: (exclusion["split"], exclusion["id"])),
        "versions": sorted(tally.versions),
        "committed": {split: _ranges(units) for split, units in tally.committed.items()},
    }
    storage.publish_document(_url(config), document, SCHEMA)


def _published(config: RunConfig) -> Tally:
    """The tally of an earlier run; an empty one where there is none or it is damaged: it only saves time."""
    try:
        document = storage.read_document(_url(config), SCHEMA)
        return Tally(
            splits={split: SplitCounts(**document["splits"][split]) for split in SPLITS},
            labels=Counter(document["labels"]),
            exclusions=document["exclusions"],
            versions=set(document["versions"]),
            committed={
                split: {unit for first, last in document["committed"][split] for unit in range(first, last + 1)}
                for split in SPLITS
            },
        )
    except FileNotFoundError:
        return Tally()
    except (UserError, KeyError, TypeError, ValueError):
        logger.warning("%s is damaged: all commit records are read again", _url(config))
        return Tally()


def _url(config: RunConfig) -> str:
    return config.folder("clips", "tally.json")


def _ranges(units: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, last): units finish nearly in order, so these are few."""
    ordered = sorted(units)
    if not ordered:
        return []
    breaks = [(last, first) for last, first in pairwise(ordered) if first != last + 1]
    return list(
        zip([ordered[0], *(first for _, first in breaks)], [*(last for last, _ in breaks), ordered[-1]], strict=True)
    )
