"""Rebuilds a committed unit that lost a shard, an index or its record from the raw videos, byte for byte."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import DamagedDocument, UserError
from clipmill.pipeline.digest import digest
from clipmill.pipeline.plan import Plan, Unit
from clipmill.pipeline.tally import Tally
from clipmill.shards.commits import ShardEntry, entry_of, read_commit, restore_unit
from clipmill.shards.format import Part
from clipmill.shards.manifest import SPLITS, Manifest

__all__ = ["Lost", "LostUnit", "find_lost", "lost_units", "restore"]

Lost = dict[tuple[str, int], tuple[tuple[ShardEntry, ...] | None, tuple[dict[str, str], ...]]]
"""The additional fields of each `LostUnit`, (shards, versions), by (split, number)."""

_MOST_NAMED = 3
"""Videos named in the message that a unit cannot be restored."""


@dataclass(frozen=True, repr=False)
class LostUnit(Unit):
    """A unit to restore.

    Attributes:
        shards: the unit's shards by the manifest; None before there is a manifest.
        versions: software versions that made the data set, by the manifest; which of them made this unit is not known.
    """

    shards: tuple[ShardEntry, ...] | None = None
    versions: tuple[dict[str, str], ...] = ()


def restore(url: str, unit: LostUnit, parts: Sequence[Part], body: dict[str, Any]) -> dict[str, Any]:
    """Publishes the objects and the record of a unit again, if the rebuilt shards equal the lost ones.

    Returns:
        The unit's `digest`. If the rebuilt shards differ, only ``cause``; nothing has been written then.
    """
    try:
        record = read_commit(url, unit.number)
    except (FileNotFoundError, UserError):
        record = None
    wanted = unit.shards
    if wanted is None and record is not None:
        wanted = tuple(map(ShardEntry.parse, record["parts"]))
    if wanted is not None and wanted != tuple(map(entry_of, parts)):
        return {"cause": _difference(unit, record, body)}
    return digest(restore_unit(url, unit.number, parts, body))


def _difference(unit: LostUnit, record: dict[str, Any] | None, body: dict[str, Any]) -> str:
    """Why the rebuilt unit differs."""
    causes = []
    made_by = unit.versions if record is None else (record["versions"],)
    if made_by and body["versions"] not in made_by:
        causes += _changes(made_by[0], body["versions"])
    failed = {exclusion["id"] for exclusion in record["exclusions"]} if record else set()
    new = [f"{one['url']}: {one['cause']}" for one in body["exclusions"] if one["id"] not in failed]
    if new:
        more = f" and {len(new) - _MOST_NAMED} more" if len(new) > _MOST_NAMED else ""
        causes.append(f"videos that fail now: {', '.join(new[:_MOST_NAMED])}{more}")
    if failed - {exclusion["id"] for exclusion in body["exclusions"]}:
        causes.append("videos that failed then succeed now")
    return "; ".join(causes) or "the contents of its videos or their sidecars have changed"


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    return [f"it was made with {name} {then.get(name, 'none')}, here is {now.get(name, 'none')}" for name in names]


def find_lost(config: RunConfig, plan: Plan, tally: Tally, damaged: Mapping[str, Collection[int]]) -> Lost:
    """The units to restore, with the additional fields of their `LostUnit`.

    These are units with an object that a listing lacks or shows with another size, units of the manifest without a
    commit record, and units known to be damaged.

    Args:
        config: config of the run.
        plan: plan of the run.
        tally: sums over the committed units.
        damaged: units that are known to be damaged, by split.
    """
    lost: Lost = {}
    for split in SPLITS:
        url = config.folder("clips", split)
        try:
            manifest = Manifest.load(url, "clips")
        except (FileNotFoundError, DamagedDocument):  # the commit records are then the only source
            manifest = None
        frozen = {} if manifest is None else manifest.units()
        versions = () if manifest is None else tuple(manifest.facts.get("versions", ()))
        numbers = set(damaged.get(split, ())) | (frozen.keys() - tally.parts[split].keys())
        numbers |= lost_units(url, tally.parts[split])
        for number in numbers & set(range(plan.num_units(split))):
            lost[split, number] = frozen.get(number), versions
    return lost


def lost_units(url: str, parts: Mapping[int, Sequence[ShardEntry]]) -> set[int]:
    """Units with an object that is missing or has another size, from one listing."""
    present = {entry.name: entry.bytes for entry in storage.list_folder(url)}
    return {
        unit
        for unit, shards in parts.items()
        if any(present.get(one.name) != one.bytes or one.index_name not in present for one in shards)
    }
