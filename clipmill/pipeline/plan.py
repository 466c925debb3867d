"""The plan: which video belongs to which split and unit of work. Made once from a listing, then authoritative.

A video's *identity* is what its storage says about its content without reading all of it: etag and size in a
bucket, size and a hash of the first and last 64 KiB on a disk. Its id is a hash of the identity, and so are
its place in the order (a unit holds unrelated videos) and its split (more videos never move a video from
``train`` to ``val``). Moving or renaming a corpus changes nothing.

Files under ``clips/plan``, all written before the first unit is worked on:

``gen-0000.parquet``
    One row a video, sorted by split, unit, ordinal: split, unit, ordinal, id, url (relative to the source),
    bytes, etag, label, actions, text.
``plan.json``
    Written last: ``generations`` [{file, sha256, videos, bytes, units: {split: count}, duplicates}] and
    ``identity``, the configuration it was made with. Units of a split are numbered through all generations.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill import storage
from clipmill.config import DataConfig, RunConfig, changed_keys, identity
from clipmill.errors import UserError
from clipmill.pipeline.sources import SourceVideo, list_videos
from clipmill.shards.format import file_sha256
from clipmill.shards.manifest import SPLITS

__all__ = ["Plan", "PlannedVideo", "Unit", "load_plan", "make_plan", "read_plan_document"]

SCHEMA = 1
EDGE_BYTES = 64 * 2**10
BATCH_ROWS = 2**16

logger = logging.getLogger(__name__)

_TEXT = pa.large_string()  # 32-bit offsets would overflow at some 20 million names
_SOURCE_COLUMNS: dict[str, pa.DataType] = {
    "url": _TEXT,
    "bytes": pa.int64(),
    "etag": _TEXT,
    "label": _TEXT,
    "actions": _TEXT,
    "text": _TEXT,
}
_PLAN_COLUMNS: dict[str, pa.DataType] = {
    "split": pa.string(),
    "unit": pa.int32(),
    "ordinal": pa.int32(),
    "id": pa.string(),
    **_SOURCE_COLUMNS,
}


@dataclass(frozen=True)
class PlannedVideo:
    """One row of the plan.

    Attributes:
        id: 16 hex digits, unique in the plan.
        url: path relative to the source.
        bytes: size of the file when it was planned.
        etag: the bucket's content tag; none on a local disk.
        label: name of its class, or none.
        actions: path of its actions relative to the source, or none.
        text: its caption, or none.
    """

    id: str
    url: str
    bytes: int
    etag: str | None
    label: str | None
    actions: str | None
    text: str | None


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
        document: ``plan.json``.
    """

    def __init__(self, document: dict[str, Any], table: pa.Table) -> None:
        self.document = document
        self._table = table
        self._rows = _unit_rows(table)

    @property
    def num_videos(self) -> int:
        """Videos in all splits, duplicates left out."""
        return self._table.num_rows

    @property
    def num_duplicates(self) -> int:
        """Listed files that hold the same video as an earlier one."""
        return sum(generation["duplicates"] for generation in self.document["generations"])

    def num_units(self, split: str) -> int:
        """Units of a split, numbered from 0."""
        return sum(generation["units"][split] for generation in self.document["generations"])

    def unit(self, split: str, number: int) -> Unit:
        """The videos of one unit, in order."""
        first, end = self._rows[split, number]
        columns = ["id", *_SOURCE_COLUMNS]
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


def read_plan_document(config: RunConfig) -> dict[str, Any]:
    """``plan.json`` of a run.

    Raises:
        FileNotFoundError: the run has no plan yet.
        UserError: it was made with other settings.
    """
    document = storage.read_document(config.folder("clips", "plan", "plan.json"), SCHEMA)
    changed = changed_keys(document["identity"], _identity_of(config))
    if changed:
        raise UserError(
            f"the clips in {config.folder('clips')} were planned with other settings: {'; '.join(changed)}. "
            "Restore them, or choose another root"
        )
    return document


def _identity_of(config: RunConfig) -> dict[str, Any]:
    """The settings that the bytes of the clips and their split depend on."""
    return {"data": identity(config.data), "seed": config.seed}


def load_plan(config: RunConfig) -> Plan:
    """The plan of a run, as it was made. The source is not looked at.

    Raises:
        FileNotFoundError: the run has no plan yet.
        UserError: it was made with other settings, or a file of it is damaged.
    """
    document = read_plan_document(config)
    tables = [_read_table(config, generation) for generation in document["generations"]]
    return Plan(document, pa.concat_tables(tables))


def _read_table(config: RunConfig, generation: dict[str, Any]) -> pa.Table:
    url = config.folder("clips", "plan", generation["file"])
    with tempfile.TemporaryDirectory(prefix="clipmill-plan-") as folder:
        path = Path(folder) / "plan.parquet"
        try:
            storage.fetch(url, path)
        except FileNotFoundError as error:
            raise UserError(f"{url} is missing; restore it, or remove the clips folder and shard again") from error
        if file_sha256(path) != generation["sha256"]:
            raise UserError(f"{url} is damaged; restore it, or remove the clips folder and shard again")
        return pq.read_table(path, memory_map=False)


# -------------------------------------------------------------------------------------- making a plan


def make_plan(config: RunConfig) -> Plan:
    """Lists the source once and publishes the plan.

    Raises:
        UserError: the source is missing, empty or unreadable; nothing has been written then.
    """
    table, order, is_val, ids, num_duplicates = _arrange(config)
    sizes = table.column("bytes").to_numpy()
    units, ordinals = _cut_units(sizes[order], is_val, config.data.unit_bytes)
    name = "gen-0000.parquet"
    with tempfile.TemporaryDirectory(prefix="clipmill-plan-") as folder:
        path = Path(folder) / name
        schema = pa.schema(_PLAN_COLUMNS)
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(0, len(order), BATCH_ROWS):
                rows = slice(first, first + BATCH_ROWS)
                columns: dict[str, Any] = {
                    "split": np.where(is_val[rows], "val", "train"),
                    "unit": units[rows],
                    "ordinal": ordinals[rows],
                    "id": [f"{number:016x}" for number in ids[rows].tolist()],
                    **table.take(pa.array(order[rows])).to_pydict(),
                }
                writer.write_table(pa.table(columns, schema))
        storage.publish_file(path, config.folder("clips", "plan", name))
        generation = {
            "file": name,
            "sha256": file_sha256(path),
            "videos": len(order),
            "bytes": int(sizes[order].sum()),
            "units": {split: int(units[is_val == (split == "val")].max(initial=-1)) + 1 for split in SPLITS},
            "duplicates": num_duplicates,
        }
    document = {"generations": [generation], "identity": _identity_of(config)}
    storage.publish_document(config.folder("clips", "plan", "plan.json"), document, SCHEMA)
    logger.info("planned %d videos (%d duplicates left out)", len(order), num_duplicates)
    return load_plan(config)


def _arrange(config: RunConfig) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray, int]:
    """The listing, and the order of the videos to plan.

    Returns:
        The listing as a table; int64[n] its rows in the order of the plan, duplicates left out; bool[n] whether
        each is in ``val``; uint64[n] their ids; the number of duplicates.
    """
    table, bases = _list_source(config.data)
    source_url = storage.absolute(config.data.source.url)
    ids, keep = _tell_apart(bases, partial(_content, table, source_url))
    # Split by the unrefined hash: a look-alike that is added later must not move its elder.
    is_val = np.fromiter((_share(config.seed, base) < config.data.val_fraction for base in bases.tolist()), bool)
    rows = np.flatnonzero(keep)
    order = rows[np.lexsort((ids[rows], is_val[rows]))]
    return table, order, is_val[order], ids[order], int(len(keep) - keep.sum())


def _list_source(data: DataConfig) -> tuple[pa.Table, np.ndarray]:
    """The listing as one table, and uint64[n] the hash of each identity; Python objects live for one batch."""
    source_url = storage.absolute(data.source.url)
    identified = _identified(list_videos(data.source), source_url)
    schema = pa.schema(_SOURCE_COLUMNS)
    batches, hashes = [], [np.empty(0, np.uint64)]
    while batch := list(islice(identified, BATCH_ROWS)):
        hashes.append(np.array([_number(video_identity) for _, video_identity in batch], np.uint64))
        listed = [video for video, _ in batch]
        columns = {
            name: [getattr(video, "name" if name == "url" else name) for video in listed] for name in _SOURCE_COLUMNS
        }
        batches.append(pa.table(columns, schema))
    return pa.concat_tables([schema.empty_table(), *batches]).combine_chunks(), np.concatenate(hashes)


def _identified(videos: Iterator[SourceVideo], source_url: str) -> Iterator[tuple[SourceVideo, str]]:
    """Videos with their identities; a file that vanished after the listing is left out."""
    for video in videos:
        url = storage.join(source_url, video.name)
        if storage.is_local(source_url):
            try:
                yield video, f"disk:{video.bytes}:{_edges_sha256(storage.local_path(url))}"
            except FileNotFoundError:
                logger.warning("%s vanished while the source was listed", url)
            except PermissionError as error:
                raise UserError(f"{url} may not be read; change its permissions or remove it") from error
        elif video.etag is None:
            raise UserError(f"{source_url} lists no etags, so its videos have no identity; use s3:// or a folder")
        else:
            yield video, f"bucket:{video.bytes}:{video.etag}"


def _edges_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(path.stat().st_size - EDGE_BYTES, 0))
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()


def _number(text: str) -> int:
    """The first 64 bits of a SHA-256; as 16 hex digits they sort as the numbers do."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _share(seed: int, base: int) -> float:
    """A number in [0, 1) that decides the split, independent of the order."""
    return _number(f"split:{seed}:{base:016x}") / 2**64


def _tell_apart(bases: np.ndarray, content: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    """Resolves equal identities by full content.

    Args:
        bases: uint64[n], the hash of each identity.
        content: what tells two rows of equal identity apart (reads the whole file on a disk).

    Returns:
        uint64[n] ids, and bool[n] False for a row that repeats an earlier row's content. Where contents differ
        behind one identity every id is refined, so that ids do not depend on the order of the listing.
    """
    ids, keep = bases.copy(), np.ones(len(bases), bool)
    by_hash = np.argsort(bases, kind="stable")
    is_repeated = np.zeros(len(bases), bool)
    equal = bases[by_hash[1:]] == bases[by_hash[:-1]]
    is_repeated[1:] |= equal
    is_repeated[:-1] |= equal
    for base, group in groupby(by_hash[is_repeated].tolist(), key=lambda row: int(bases[row])):
        contents: dict[str, int] = {}
        for row in group:
            keep[row] = contents.setdefault(content(row), row) == row
        if len(contents) > 1:
            for text, row in contents.items():
                ids[row] = _number(f"{base:016x}:{text}")
    return ids, keep


def _content(table: pa.Table, source_url: str, row: int) -> str:
    if not storage.is_local(source_url):
        return f"{table['bytes'][row].as_py()}:{table['etag'][row].as_py()}"
    return file_sha256(storage.local_path(storage.join(source_url, table["url"][row].as_py())))


def _cut_units(sizes: np.ndarray, is_val: np.ndarray, unit_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each split, in order, into units: int32[n] unit and int32[n] ordinal in it.

    A unit closes before the video that would take it beyond ``unit_bytes``; it holds at least one.
    """
    units, ordinals = np.empty(len(sizes), np.int32), np.empty(len(sizes), np.int32)
    unit, ordinal, filled, split = 0, 0, 0, False
    for row, (size, in_val) in enumerate(zip(sizes.tolist(), is_val.tolist(), strict=True)):
        if in_val != split:
            unit, ordinal, filled, split = 0, 0, 0, in_val
        elif ordinal and filled + size > unit_bytes:
            unit, ordinal, filled = unit + 1, 0, 0
        units[row], ordinals[row] = unit, ordinal
        ordinal, filled = ordinal + 1, filled + size
    return units, ordinals
