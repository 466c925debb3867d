"""The plan: which video belongs to which split and unit of work. Made from a listing, then authoritative.

A video's *identity* is what its storage says about its content without reading all of it: etag and size in a
bucket, size and a hash of the first and last 64 KiB on a disk. Its id is a hash of the identity, and so are
its place in the order (a unit holds unrelated videos). A video may be a span of its file: then the span is part of its
identity. Where the source itself has no splits, a hash of the video's *group* (its origin; by default the identity of
its file) decides: videos of one group are in one split, and more videos never move a video from ``train`` to ``val``.
Moving or renaming a corpus changes nothing.

Files under ``clips/plan``, none of which ever changes:

``gen-0000-<sha8>.parquet``
    One generation (`generation.py` makes them): what one listing had that no earlier one had, or the quarantined videos
    that are tried again. One row a video, sorted by split, unit, ordinal: split, unit, ordinal, id, url (relative to
    the source, or absolute), bytes, etag, label, actions, text, member (which video of the file, where it holds
    several), metadata (JSON), start_seconds and end_seconds (the span of the file), sidecars (endings of the files
    beside it that describe it), fault (why the source cannot give the video).
``gen-0000.json``
    Created last, and only if there is none: of several planners of a generation one wins, whatever each of them knew.
    {kind, file, sha256, videos, bytes, units: {split: count}, duplicates, ambiguous, other_files, yield, identity}.
    ``identity`` is the configuration it was made with. Units of a split are numbered through all generations.
    ``ambiguous``: hashes of identities behind which that listing found different contents (16 hex digits each).
    ``other_files``: files of the folder that are no videos, {ending: count}. The plan is generations 0, 1, 2, ... up to
    the first that has no such document.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill import storage
from clipmill.config import RunConfig, changed_keys, identity
from clipmill.errors import StageFailed, UserError
from clipmill.lease import Lease
from clipmill.pipeline.listing import SOURCE_COLUMNS
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import file_sha256

__all__ = [
    "PLAN_COLUMNS",
    "GenerationKind",
    "Plan",
    "PlannedVideo",
    "Unit",
    "create_generation",
    "load_plan",
    "read_generations",
]

SCHEMA = 3

GenerationKind = Literal["listed", "retried"]
"""``listed``: videos that no earlier generation has. ``retried``: quarantined ones of earlier generations."""

BATCH_ROWS = 2**16
PLAN_COLUMNS: dict[str, pa.DataType] = {
    "split": pa.string(),
    "unit": pa.int32(),
    "ordinal": pa.int32(),
    "id": pa.string(),
    **SOURCE_COLUMNS,
}


@dataclass(frozen=True)
class PlannedVideo:
    """One row of the plan.

    Attributes:
        id: 16 hex digits, unique in its generation.
        url: path relative to the source, or an absolute path or URL.
        bytes: size of the file when it was planned.
        etag: the bucket's content tag; none on a local disk.
        label: name of its class, or none.
        actions: path of its actions relative to the source, or none.
        text: its caption, or none.
        member: which video of the file it is, where that holds several, or none.
        metadata: JSON object of what else its source knows about it, or none.
        start_seconds: where it begins in its file, counted from the file's first frame; None: at that frame.
        end_seconds: where it ends; None: with the file.
        sidecars: endings of the files beside it that describe it (``.json .txt``), or none.
        fault: why its source cannot give it; None where it can.
    """

    id: str
    url: str
    bytes: int
    etag: str | None
    label: str | None
    actions: str | None
    text: str | None
    member: str | None
    metadata: str | None
    start_seconds: float | None = None
    end_seconds: float | None = None
    sidecars: str | None = None
    fault: str | None = None

    @property
    def span(self) -> tuple[float | None, float | None]:
        """(start, end) in seconds; (None, None) is the whole file."""
        return self.start_seconds, self.end_seconds

    @property
    def name(self) -> str:
        """Name in messages and clips: the URL without credentials, with the member and the span after ``#``.

        A span is written as a temporal media fragment (``one.mp4#t=1.5,3``; https://www.w3.org/TR/media-frags).
        """
        parts = [] if self.member is None else [self.member]
        if self.span != (None, None):
            start, end = ("" if bound is None else np.format_float_positional(bound, trim="-") for bound in self.span)
            parts.append(f"t={start},{end}" if end else f"t={start}")
        url = storage.shown(self.url)
        return "#".join([url, "&".join(parts)]) if parts else url


@dataclass(frozen=True, repr=False)
class Unit:
    """Whole videos that one worker turns into shards, under one commit record."""

    split: str
    number: int
    videos: tuple[PlannedVideo, ...]

    def __repr__(self) -> str:
        return f"{self.split}/{self.number:06d}"


class Plan:
    """All generations of a plan. Videos become Python objects only when their unit is asked for.

    Attributes:
        generations: their documents, in order.
    """

    def __init__(self, generations: list[dict[str, Any]], table: pa.Table) -> None:
        self.generations = generations
        self._table = table
        self._rows = _unit_rows(table)
        self._retried_in = self._find_retried()

    @property
    def num_videos(self) -> int:
        """Videos in all splits, duplicates left out."""
        return sum(g["videos"] for g in self.generations if g["kind"] != "retried")

    @property
    def num_duplicates(self) -> int:
        """Listed files that hold the same video as an earlier one."""
        return sum(generation["duplicates"] for generation in self.generations)

    @property
    def other_files(self) -> dict[str, int]:
        """Files of the source's folder that are no videos, by ending, when it was listed last."""
        return next(g["other_files"] for g in reversed(self.generations) if g["kind"] == "listed")

    def num_units(self, split: str) -> int:
        """Units of a split, numbered from 0."""
        return sum(generation["units"][split] for generation in self.generations)

    def is_retried(self, video_id: str, unit: int) -> bool:
        """Whether a video that ``unit`` of its split excluded is tried again in a later unit."""
        return self._retried_in.get(video_id, -1) > unit

    def _find_retried(self) -> dict[str, int]:
        """The last unit of each video that is tried again; a video never changes its split."""
        retried: dict[str, int] = {}
        first = 0
        for generation in self.generations:
            if generation["kind"] == "retried":
                rows = self._table.slice(first, generation["videos"])
                retried |= dict(zip(rows["id"].to_pylist(), rows["unit"].to_pylist(), strict=True))
            first += generation["videos"]
        return retried

    def ids(self) -> np.ndarray:
        """uint64[n]: the ids of all rows, as numbers."""
        batches = self._table.select(["id"]).to_batches(BATCH_ROWS)
        numbers = [np.array([int(i, 16) for i in batch["id"].to_pylist()], np.uint64) for batch in batches]
        return np.concatenate([np.empty(0, np.uint64), *numbers])

    def rows(self, places: np.ndarray) -> pa.Table:
        """The rows, with `PLAN_COLUMNS`, at these places of all generations."""
        return self._table.take(pa.array(places))

    def unit(self, split: str, number: int) -> Unit:
        """The videos of one unit, in order."""
        first, end = self._rows[split, number]
        columns = ["id", *SOURCE_COLUMNS]
        rows = self._table.select(columns).slice(first, end - first).to_pylist()
        return Unit(split, number, tuple(PlannedVideo(**row) for row in rows))


def _unit_rows(table: pa.Table) -> dict[tuple[str, int], tuple[int, int]]:
    """First and end row of each unit: rows of a unit are consecutive."""
    units = table.column("unit").to_numpy()
    splits = table.column("split").combine_chunks().dictionary_encode()
    codes, names = splits.indices.to_numpy(zero_copy_only=False), splits.dictionary.to_pylist()
    firsts = np.flatnonzero((np.diff(units, prepend=-1) != 0) | (np.diff(codes, prepend=-1) != 0))
    ends = np.append(firsts[1:], len(units))
    return {
        (names[codes[first]], int(units[first])): (int(first), int(end))
        for first, end in zip(firsts, ends, strict=True)
    }


# ------------------------------------------------------------------------------------- reading a plan


def read_generations(config: RunConfig) -> list[dict[str, Any]]:
    """The documents of all generations of a run's plan, in order; none where it has no plan yet.

    Raises:
        UserError: it was made with other settings, or by an earlier clipmill.
    """
    generations = []
    for number in itertools.count():
        try:
            generation = storage.read_document(_document_url(config, number), SCHEMA)
        except FileNotFoundError:
            break
        if generation["schema"] < SCHEMA:
            raise _planned_earlier(config)
        changed = changed_keys(generation["identity"], _identity_of(config))
        if changed:
            raise UserError(
                f"the clips in {config.folder('clips')} were planned with other settings: {'; '.join(changed)}. "
                "Restore them, or choose another root"
            )
        generations.append(generation)
    if not generations and storage.exists(config.folder("clips", "plan", "plan.json")):  # the plan up to schema 2
        raise _planned_earlier(config)
    return generations


def create_generation(config: RunConfig, lease: Lease, number: int, generation: dict[str, Any]) -> None:
    """Makes a generation hold, if no other planner has made one of this number hold.

    Raises:
        StageFailed: another planner has, or a later run has taken the folder over. The plan is unchanged then.
    """
    lease.check()
    document = {**generation, "identity": _identity_of(config)}
    if not storage.create_document(_document_url(config, number), document, SCHEMA):
        lease.check()  # the usual reason, and the better message
        raise StageFailed(
            f"another run has planned generation {number} of {config.folder('clips')} meanwhile; "
            "run the same command again"
        )


def _document_url(config: RunConfig, number: int) -> str:
    return config.folder("clips", "plan", f"gen-{number:04d}.json")


def _planned_earlier(config: RunConfig) -> UserError:
    return UserError(f"the clips in {config.folder('clips')} were planned by an earlier clipmill; choose another root")


def _identity_of(config: RunConfig) -> dict[str, Any]:
    """The settings that the bytes of the clips and their split depend on."""
    return {"data": identity(config.data), "seed": config.seed}


def load_plan(config: RunConfig) -> Plan:
    """The plan of a run, as it was made. The source is not looked at.

    Raises:
        FileNotFoundError: the run has no plan yet.
        UserError: it was made with other settings, or a file of it is damaged.
    """
    generations = read_generations(config)
    if not generations:
        raise FileNotFoundError(_document_url(config, 0))
    tables = [_read_table(config, generation) for generation in generations]
    return Plan(generations, pa.concat_tables(tables))


def _read_table(config: RunConfig, generation: dict[str, Any]) -> pa.Table:
    url = config.folder("clips", "plan", generation["file"])
    with ScratchFolder("plan") as folder:
        path = folder / "plan.parquet"
        try:
            storage.fetch(url, path)
        except FileNotFoundError as error:
            raise UserError(f"{url} is missing; restore it, or remove the clips folder and shard again") from error
        if file_sha256(path) != generation["sha256"]:
            raise UserError(f"{url} is damaged; restore it, or remove the clips folder and shard again")
        return pq.read_table(path, memory_map=False)
