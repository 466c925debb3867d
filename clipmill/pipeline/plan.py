"""The plan: the split and the unit of work of each video. Once made from a listing, it is authoritative.

A video's *identity* describes its content without reading all of it: etag and size in a bucket, size and a hash of the
first and last 64 KiB on a disk. If the video is a span of its file, the span is part of the identity. The video's id
and its position in the plan are hashes of the identity, so a unit holds unrelated videos.

If the source has no splits of its own, a hash of the video's *group* decides (its origin; by default the identity of
its file). So all videos of a group are in one split, and new videos never move a video from ``train`` to ``val``.
Moving or renaming a corpus changes nothing.

Files under ``clips/plan``, which never change:

``gen-0000-<sha8>.parquet``
    The videos of one generation, made by `planning`: those of one listing that no earlier generation has, or the
    quarantined videos that are tried again. One row per video, sorted by split, unit, ordinal. Columns: split, unit,
    ordinal, id, url (relative to the source, or absolute), bytes, etag, label, actions, text, member (selects a video
    in a file with several), metadata (JSON), start_seconds and end_seconds (the span of the file), sidecars (extensions
    of the files that describe it), fault (why the source cannot provide the video), file (identity of its file, if that
    is not ``bucket:<bytes>:<etag>``). A unit never spans two row groups, so it can be read alone.
``gen-0000.json``
    The generation's document, created last and exclusively: of several planners of a generation exactly one wins.
    {kind, file, sha256, videos, bytes, units: {split: count}, base_url, duplicates, ambiguous, other_files, yield,
    identity}. ``base_url`` is the folder that relative URLs refer to. ``identity`` is the config it was made with.
    ``ambiguous`` lists hashes (16 hex digits) of identities for which the listing found different contents.
    ``other_files`` counts the files of the folder that are not videos, {extension: count}. Units of a split are
    numbered through all generations. The plan consists of generations 0, 1, 2, ... up to the first without a document.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill import storage
from clipmill.config import RunConfig, changed_keys, identity
from clipmill.errors import StageFailed, UserError
from clipmill.lease import Lease
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import SHA256, is_count
from clipmill.shards.format import file_sha256
from clipmill.shards.manifest import SPLITS

__all__ = [
    "PLAN_COLUMNS",
    "SOURCE_COLUMNS",
    "GenerationKind",
    "Plan",
    "PlannedVideo",
    "Unit",
    "create_generation",
    "load_plan",
    "numbers_of",
    "read_generations",
]

SCHEMA = 3

_FILE_NAME = re.compile(r"gen-\d{4,9}-[0-9a-f]{8}\.parquet")

GenerationKind = Literal["listed", "retried"]
"""``listed``: videos that no earlier generation has. ``retried``: quarantined ones of earlier generations."""

_TEXT = pa.large_string()  # 32-bit offsets would overflow at about 20 million names
SOURCE_COLUMNS: dict[str, pa.DataType] = {
    "url": _TEXT,
    "bytes": pa.int64(),
    "etag": _TEXT,
    "label": _TEXT,
    "actions": _TEXT,
    "text": _TEXT,
    "member": _TEXT,
    "metadata": _TEXT,
    "start_seconds": pa.float64(),
    "end_seconds": pa.float64(),
    "sidecars": _TEXT,
    "fault": _TEXT,
}
"""The columns that a source provides and a worker needs."""

PLAN_COLUMNS: dict[str, pa.DataType] = {
    "split": pa.string(),
    "unit": pa.int32(),
    "ordinal": pa.int32(),
    "id": pa.string(),
    **SOURCE_COLUMNS,
    "file": _TEXT,
}


@dataclass(frozen=True)
class PlannedVideo:
    """One row of the plan.

    Attributes:
        id: 16 hex digits, unique in its generation.
        url: path relative to the source, or an absolute path or URL.
        bytes: size of the file when it was planned.
        etag: the bucket's content tag; None on a local disk.
        label: name of its class; None without a class.
        actions: path of its actions relative to the source; None without actions.
        text: its caption; None without a caption.
        member: selects the video in a file that holds several; None for a file with one.
        metadata: JSON object with the source's other facts about it; None without any.
        start_seconds: start in its file, in seconds from the file's first frame; None means the first frame.
        end_seconds: end in its file; None means the end of the file.
        sidecars: extensions of the files that describe it (``.json .txt``); None without sidecars.
        fault: why its source cannot provide it; None if it can.
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
    """All generations of a plan. Memory holds an index of the units; rows are read from files on this machine.

    Attributes:
        generations: their documents, in order.
    """

    def __init__(self, generations: list[dict[str, Any]], files: Sequence[pq.ParquetFile]) -> None:
        """``files``: the rows of each generation."""
        self.generations = generations
        self._files = files
        self._groups = [(file, index) for file in files for index in range(file.num_row_groups)]
        self._units = self._index_units()
        self._retried_ids, self._retried_units = self._index_retried()
        self._last_group: tuple[int, pa.Table] | None = None

    @property
    def num_videos(self) -> int:
        """Videos in all splits, without duplicates."""
        return sum(g["videos"] for g in self.generations if g["kind"] != "retried")

    @property
    def num_duplicates(self) -> int:
        """Listed files that hold the same video as an earlier one."""
        return sum(generation["duplicates"] for generation in self.generations)

    @property
    def other_files(self) -> dict[str, int]:
        """Files of the source's folder that are not videos, by extension, from the newest listing."""
        return next(g["other_files"] for g in reversed(self.generations) if g["kind"] == "listed")

    def num_units(self, split: str) -> int:
        """Units of a split, numbered from 0."""
        return sum(generation["units"][split] for generation in self.generations)

    def is_retried(self, video_id: str, unit: int) -> bool:
        """Whether a video that was excluded in ``unit`` of its split is tried again in a later unit."""
        number = np.uint64(int(video_id, 16))
        place = np.searchsorted(self._retried_ids, number)
        is_found = place < len(self._retried_ids) and self._retried_ids[place] == number
        return bool(is_found and self._retried_units[place] > unit)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows in order, one row group at a time. ``columns`` None reads all `PLAN_COLUMNS`."""
        for _, table in self.tables_by_generation(columns):
            yield table

    def tables_by_generation(self, columns: Sequence[str] | None = None) -> Iterator[tuple[dict[str, Any], pa.Table]]:
        """Like `tables`, each with the document of its generation."""
        for generation, file in zip(self.generations, self._files, strict=True):
            for index in range(file.num_row_groups):
                yield generation, file.read_row_group(index, columns=columns)

    def url_of(self, number: int) -> str:
        """The URL of the video whose id is this number."""
        for table in self.tables(["id", "url"]):
            found = np.flatnonzero(numbers_of(table["id"]) == np.uint64(number))
            if len(found):
                return table["url"][int(found[0])].as_py()
        raise KeyError(number)

    def unit(self, split: str, number: int) -> Unit:
        """The videos of one unit, in order."""
        group, first, end = self._units[split][number].tolist()
        if self._last_group is None or self._last_group[0] != group:  # units are mostly requested in order
            file, index = self._groups[group]
            self._last_group = group, file.read_row_group(index, columns=["id", *SOURCE_COLUMNS])
        rows = self._last_group[1].slice(first, end - first).to_pylist()
        return Unit(split, number, tuple(PlannedVideo(**row) for row in rows))

    def _index_units(self) -> dict[str, np.ndarray]:
        """int32[num_units, 3] for each split: row group, first row in it, end row in it."""
        found: dict[str, list[np.ndarray]] = {split: [np.empty((0, 3), np.int32)] for split in SPLITS}
        for group, table in enumerate(self.tables(["split", "unit"])):
            units = table["unit"].to_numpy()
            for split in SPLITS:
                rows = np.flatnonzero(pc.equal(table["split"], split).to_numpy())
                if len(rows):  # consecutive, as are those of each unit
                    firsts = rows[np.diff(units[rows], prepend=-1) != 0]
                    ends = np.append(firsts[1:], rows[-1] + 1)
                    found[split].append(np.stack([np.full(len(firsts), group), firsts, ends], 1).astype(np.int32))
        return {split: np.concatenate(parts) for split, parts in found.items()}

    def _index_retried(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted ids of the videos that are tried again, and the last unit of each. A video never changes its split."""
        ids, units = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        for generation, file in zip(self.generations, self._files, strict=True):
            if generation["kind"] == "retried":
                table = file.read(columns=["id", "unit"])
                ids.append(numbers_of(table["id"]))
                units.append(table["unit"].to_numpy())
        all_ids = np.concatenate(ids)
        order = np.argsort(all_ids, kind="stable")
        all_ids = all_ids[order]
        is_last = np.append(all_ids[1:] != all_ids[:-1], True)[: len(order)]
        return all_ids[is_last], np.concatenate(units)[order][is_last]


def numbers_of(ids: pa.ChunkedArray) -> np.ndarray:
    """uint64[n]: ids of 16 hex digits as numbers."""
    return np.frombuffer(bytes.fromhex("".join(ids.to_pylist())), ">u8").astype(np.uint64)


# ------------------------------------------------------------------------------------- reading a plan


def read_generations(config: RunConfig) -> list[dict[str, Any]]:
    """The documents of all generations of a run's plan, in order; empty before there is a plan.

    Raises:
        UserError: the plan was made with other settings, or by an earlier clipmill.
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
        _check(generation, _document_url(config, number))
        generations.append(generation)
    if not generations and storage.exists(config.folder("clips", "plan", "plan.json")):  # the plan up to schema 2
        raise _planned_earlier(config)
    return generations


def _check(generation: dict[str, Any], url: str) -> None:
    """Raises `UserError` if a generation's document is invalid. It is checked because its file name becomes part of a
    path.
    """
    try:
        is_right = (
            generation["kind"] in get_args(GenerationKind)
            and _FILE_NAME.fullmatch(generation["file"])
            and SHA256.fullmatch(generation["sha256"])
            and generation["units"].keys() == set(SPLITS)
            and all(map(is_count, [generation["videos"], generation["duplicates"], *generation["units"].values()]))
        )
    except (KeyError, TypeError, AttributeError):
        is_right = False
    if not is_right:
        raise UserError(f"{url} is damaged; restore it, or remove the clips folder and shard again")


def create_generation(config: RunConfig, lease: Lease, number: int, generation: dict[str, Any]) -> None:
    """Adds a generation to the plan, unless another planner has added one with this number.

    Raises:
        StageFailed: another planner was first, or a later run has taken over the folder. The plan is then unchanged.
    """
    lease.check()
    document = {**generation, "identity": _identity_of(config)}
    if not storage.create_document(_document_url(config, number), document, SCHEMA):
        lease.check()  # a lost lease is the usual reason, and has the better message
        raise StageFailed(
            f"another run has planned generation {number} of {config.folder('clips')} meanwhile; "
            "run the same command again"
        )


def _document_url(config: RunConfig, number: int) -> str:
    return config.folder("clips", "plan", f"gen-{number:04d}.json")


def _planned_earlier(config: RunConfig) -> UserError:
    return UserError(f"the clips in {config.folder('clips')} were planned by an earlier clipmill; choose another root")


def _identity_of(config: RunConfig) -> dict[str, Any]:
    """The settings that the bytes and splits of the clips depend on."""
    return {"data": identity(config.data), "seed": config.seed}


def load_plan(config: RunConfig) -> Plan:
    """Loads the plan of a run. The source is not read.

    Raises:
        FileNotFoundError: the run has no plan yet.
        UserError: the plan was made with other settings, or one of its files is damaged.
    """
    generations = read_generations(config)
    if not generations:
        raise FileNotFoundError(_document_url(config, 0))
    return Plan(generations, [_open_rows(config, generation) for generation in generations])


def _open_rows(config: RunConfig, generation: dict[str, Any]) -> pq.ParquetFile:
    """Opens the rows of a generation. Rows in a bucket get a local copy that lives as long as its readers."""
    url = config.folder("clips", "plan", generation["file"])
    try:
        if storage.is_local(url):
            return _open_whole(storage.local_path(url), url, generation["sha256"])
        with ScratchFolder("plan") as folder:
            storage.fetch(url, folder / "rows.parquet")
            return _open_whole(folder / "rows.parquet", url, generation["sha256"])
    except FileNotFoundError as error:
        raise UserError(f"{url} is missing; restore it, or remove the clips folder and shard again") from error


def _open_whole(path: Path, url: str, sha256: str) -> pq.ParquetFile:
    if file_sha256(path) != sha256:
        raise UserError(f"{url} is damaged; restore it, or remove the clips folder and shard again")
    return pq.ParquetFile(pa.OSFile(str(path)))  # an open file stays readable after its removal
