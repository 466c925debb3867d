"""Clips that trainings skip: reads the file that names them, and removes them from a manifest.

The file has one JSON object per line; `clipmill.pipeline.duplicates` writes one. A clip is named by its shard and its
row. Names of shards contain hashes, so the file means the same clips in every run. The tokens of a clip are found by
its unit: unit n of the tokens is unit n of the clips, in the same order.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.commits import ShardEntry, is_count, read_commits, unit_of
from clipmill.shards.manifest import Manifest

__all__ = ["ExcludedClip", "exclude", "read_exclusions"]


class ExcludedClip(NamedTuple):
    """A clip that trainings skip."""

    key: str
    """Key of the clip, for readers of the file; it is not used."""
    shard: str
    """Name of its shard of clips."""
    row: int
    """Its row in its unit, counted over the unit's shards of clips."""


def read_exclusions(url: str) -> list[ExcludedClip]:
    """Reads the clips that a file names. Unknown keys of a line are ignored.

    Raises:
        UserError: the file does not exist, or a line does not name a clip.
    """
    try:
        lines = storage.read_bytes(url).decode(errors="replace").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"data.exclude: there is no file {url}; `clipmill inspect ROOT --duplicates FILE` writes one"
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            clip = ExcludedClip(values["key"], values["shard"], values["row"])
            is_right = isinstance(clip.key, str) and unit_of(clip.shard) is not None and is_count(clip.row)
        except (ValueError, KeyError, TypeError):
            is_right = False
        if not is_right:
            raise UserError(
                f'data.exclude: line {number} of {url} is not {{"key": KEY, "shard": NAME, "row": ROW}}; write it '
                "again by `clipmill inspect ROOT --duplicates FILE`"
            )
        found.append(clip)
    return found


def exclude(manifest: Manifest, clips: Iterable[ExcludedClip]) -> Manifest:
    """A manifest of clips or tokens without those of ``clips`` that are in it.

    Raises:
        UserError: the commit record of tokens is missing or damaged.
    """
    wanted: dict[int, list[ExcludedClip]] = defaultdict(list)
    for clip in clips:
        wanted[unit_of(clip.shard) or 0].append(clip)
    units = {unit: shards for unit, shards in manifest.units().items() if unit in wanted and shards}
    sources = _shards_of_clips(manifest, units)
    numbers = {shard.name: number for number, shard in enumerate(manifest.shards)}
    rows: dict[int, set[int]] = defaultdict(set)
    for unit, shards in units.items():
        ends = np.cumsum([shard.samples for shard in shards])
        for clip in wanted[unit]:
            if clip.shard in sources[unit] and clip.row < ends[-1]:
                part = int(np.searchsorted(ends, clip.row, side="right"))
                rows[numbers[shards[part].name]].add(clip.row - int(ends[part]) + shards[part].samples)
    return manifest.without({shard: sorted(found) for shard, found in rows.items()})


def _shards_of_clips(manifest: Manifest, units: dict[int, tuple[ShardEntry, ...]]) -> dict[int, Sequence[str]]:
    """Names of each unit's shards of clips; for tokens, those of the clips that they were made from."""
    if manifest.kind == "clips":
        return {unit: [shard.name for shard in shards] for unit, shards in units.items()}
    try:
        return {record["unit"]: record["clips"] for record in read_commits(manifest.url, list(units))}
    except FileNotFoundError as error:
        raise UserError(f"{manifest.url} lacks a commit record ({error}); restore it, or tokenize again") from error
