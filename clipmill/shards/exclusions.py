"""Clips that trainings leave out: a file that names them, and what a manifest is without them.

A file has one JSON object a line; `clipmill.pipeline.duplicates` writes one. A clip is named by the shard of clips that
holds it and its row there. Names of shards contain hashes, so a file never means other clips than those it was made
for, in whatever run they lie. Tokens of a clip are found by its unit: unit n of the tokens is unit n of the clips, in
the same order.
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
    """A clip that trainings leave out."""

    key: str
    """For people."""
    shard: str
    """Name of the shard of clips that holds it."""
    row: int
    """In its unit, counted over the unit's shards of clips."""


def read_exclusions(url: str) -> list[ExcludedClip]:
    """The clips that a file names; keys of a line that are not known are ignored.

    Raises:
        UserError: there is no such file, or a line names no clip.
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
    """Names of the shards of clips that each unit is, or was made of."""
    if manifest.kind == "clips":
        return {unit: [shard.name for shard in shards] for unit, shards in units.items()}
    try:
        return {record["unit"]: record["clips"] for record in read_commits(manifest.url, list(units))}
    except FileNotFoundError as error:
        raise UserError(f"{manifest.url} lacks a commit record ({error}); restore it, or tokenize again") from error
