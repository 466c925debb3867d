"""Recognizes files that were moved or uploaded again: their identity has changed, but not their content.

The identity of a file is ``kind:bytes:tag`` (`file_identity`). Two identities of the same kind can be compared: hashes
of edges (files on a disk), or MD5s of objects uploaded in one part. Others cannot: an MD5 with the tag of a multipart
upload, or a tag with a hash of edges. Files of equal size with such identities are compared by their edges, the first
and last 64 KiB. A file is not read if no such other file has its size.

A recognized file takes the identity of the planned file; in a first listing, that of the file whose tag covers its
content. So its videos count as planned, and its new spans and members are in the split of the old ones.

The edges of a planned file are known from its identity, from the commit record of its video, or by reading it at its
old place. If all of these fail and the MD5 does not help, a file of the same size is skipped with a warning, because it
may be a video of the other split.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import StorageUnavailable, UserError
from clipmill.pipeline.plan import Plan
from clipmill.pipeline.planning.identity import is_md5, whole_md5
from clipmill.pipeline.planning.listing import LISTED_COLUMNS
from clipmill.pipeline.planning.spool import Spool
from clipmill.pipeline.sources.record import edges_sha256, file_identity
from clipmill.shards.commits import committed_units, read_commits

__all__ = [
    "UnknownFiles",
    "file_column",
    "has_file_identity",
    "identity_covers_content",
    "listed_files",
    "planned_files",
    "planned_identities",
]

_TEXT = pa.large_string()
_FILE = r"^(?P<file>[a-z]+:(?P<size>[0-9]+):[^:]*)"
_NO_FILE = r"^(fault|missing):"
_DISK, _WHOLE = r"^disk:", r"^bucket:[0-9]+:[0-9a-f]{32}(:|$)"
"""Identities that can be compared among themselves: of files on a disk, and of objects uploaded in one part."""

_READS_AT_ONCE = 64
_NUM_SIZES = 2**28
"""Sizes are compared modulo this number. The table has one byte for each; the system maps only the pages in use."""

_FILE_COLUMNS: dict[str, pa.DataType] = {
    "file": _TEXT,
    "size": pa.int64(),
    "where": _TEXT,
    "edges": _TEXT,
    "is_known": pa.bool_(),
}
"""Identity and bytes of a file; its absolute (or former) URL; the hash of its edges if a commit record states it;
whether the file is known.
"""

logger = logging.getLogger(__name__)


def identity_covers_content(table: pa.Table, base_url: str) -> np.ndarray:
    """bool[n]: whether the identities of listed rows can be compared with those of all other files of their source."""
    return _matches(table["identity"], _DISK if storage.is_local(base_url) else _WHOLE)


def has_file_identity(table: pa.Table) -> np.ndarray:
    """bool[n]: whether listed rows have the identity of a file, not that of a fault."""
    return _matches(table["identity"], _FILE) & ~_matches(table["identity"], _NO_FILE)


def file_column(table: pa.Table) -> pa.ChunkedArray:
    """The file identity of each listed row; null if it has none, or if it follows from the plan's other columns."""
    files, _ = _files_and_sizes(table["identity"])
    is_stated = pc.fill_null(pc.equal(files, _bucket_identities(table)), False)
    return pc.if_else(is_stated, pa.scalar(None, _TEXT), files)


def planned_identities(table: pa.Table) -> pa.ChunkedArray:
    """The file identity of each planned row; null if the file could not be read."""
    return pc.coalesce(table["file"], _bucket_identities(table))


def _matches(identities: pa.ChunkedArray, pattern: str) -> np.ndarray:
    return pc.fill_null(pc.match_substring_regex(identities, pattern), False).to_numpy()


def _files_and_sizes(identities: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    no_file = pc.match_substring_regex(identities, _NO_FILE)
    found = pc.extract_regex(pc.if_else(no_file, pa.scalar(None, _TEXT), identities), _FILE)
    return pc.struct_field(found, "file").cast(_TEXT), pc.struct_field(found, "size").cast(pa.int64())


def _bucket_identities(table: pa.Table) -> pa.ChunkedArray:
    colon, kind = pa.scalar(":", _TEXT), pa.scalar("bucket", _TEXT)
    return pc.binary_join_element_wise(kind, table["bytes"].cast(_TEXT), table["etag"].cast(_TEXT), colon)


class UnknownFiles:
    """Listed rows with unknown files, and the known files that they may equal, joined by size in scratch files."""

    def __init__(self, folder: Path, base_url: str, limits: storage.Limits) -> None:
        """Keeps rows in ``folder``.

        Args:
            folder: scratch folder, created here.
            base_url: the folder that relative URLs of the rows refer to.
            limits: limits of time and size for a file of a web server.
        """
        self._spool = Spool(folder, "key")
        self._base_url, self._limits = base_url, limits
        self._has_size = np.zeros(_NUM_SIZES, bool)
        self._has_mixed_size = np.zeros(_NUM_SIZES, bool)

    def __len__(self) -> int:
        return self._spool.num_rows

    def add(self, table: pa.Table) -> None:
        """Adds rows of `LISTED_COLUMNS`."""
        files, sizes = _files_and_sizes(table["identity"])
        numbers = sizes.to_numpy() % _NUM_SIZES
        self._has_size[numbers] = True
        self._has_mixed_size[numbers[~_matches(files, _WHOLE)]] = True
        where = [storage.resolve(self._base_url, url) for url in table["url"].to_pylist()]
        columns = {"file": files, "size": sizes, "where": where}
        self._add({**{name: table[name] for name in LISTED_COLUMNS}, **columns}, is_known=False)

    def add_known(self, tables: Iterable[pa.Table]) -> None:
        """Adds known files that the unknown ones may equal: tables of ``file``, ``size``, ``where``, ``edges``."""
        for table in tables:
            self._add({name: table[name] for name in table.column_names}, is_known=True)

    def may_match(self, files: pa.ChunkedArray, sizes: pa.ChunkedArray) -> np.ndarray:
        """bool[n]: whether an unknown file has the size of each file, and an identity that cannot be compared with it.

        It is True for a few others as well, which only costs time.
        """
        numbers = pc.fill_null(sizes, 0).to_numpy() % _NUM_SIZES
        is_wanted = np.where(_matches(files, _WHOLE), self._has_mixed_size[numbers], self._has_size[numbers])
        return is_wanted & pc.is_valid(files).to_numpy()

    def recognized(self) -> Iterator[pa.Table]:
        """Yields the rows of unknown files, under the identity of a known file if they equal one.

        Rows that may equal a planned file that can no longer be read are skipped.
        """
        num_skipped, example = 0, ""
        for table in self._spool.ranges():
            known = table.filter(table["is_known"])
            rows = table.filter(pc.invert(table["is_known"]))
            names = _recognize([*_files(known), *_files(rows)], self._limits)
            replacements = [names[file] for file in rows["file"].to_pylist()]
            is_kept = np.array([name is not None for name in replacements], bool)
            if not is_kept.all():
                num_skipped += int((~is_kept).sum())
                example = rows["where"][int(np.flatnonzero(~is_kept)[0])].as_py()
            yield _renamed(rows, replacements).filter(pa.array(is_kept)).select(list(LISTED_COLUMNS))
        if num_skipped:
            logger.warning(
                "skipped %d videos, such as %s: a planned file of the same size is no longer where it was, so they "
                "cannot be compared; put it back while this command runs, or choose another root",
                num_skipped,
                storage.shown(example),
            )

    def _add(self, columns: dict[str, Any], *, is_known: bool) -> None:
        num_rows = len(columns["file"])
        kinds = {**LISTED_COLUMNS, **_FILE_COLUMNS}
        table = pa.table(
            {
                name: columns[name] if name in columns else pa.nulls(num_rows, kind)
                for name, kind in kinds.items()
                if name != "is_known"
            }
        ).append_column("is_known", pa.array(np.full(num_rows, is_known)))
        # Fibonacci hashing spreads sizes evenly over the ranges of the spool.
        keys = table["size"].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._spool.add(table.cast(pa.schema(kinds)).append_column("key", pa.array(keys)))


def _renamed(rows: pa.Table, names: list[str | None]) -> pa.Table:
    """Replaces the file identity of each row, also inside its ``identity``, ``group`` and ``together``."""
    files = rows["file"].to_pylist()
    for column in ("identity", "group", "together"):
        texts = [
            text if text is None or name is None or not f"{text}:".startswith(f"{file}:") else name + text[len(file) :]
            for text, file, name in zip(rows[column].to_pylist(), files, names, strict=True)
        ]
        rows = rows.set_column(rows.schema.get_field_index(column), column, pa.array(texts, _TEXT))
    return rows


# -------------------------------------------------------------------------------------- which file is which


@dataclass(frozen=True)
class _File:
    identity: str
    where: str
    edges: str | None
    is_known: bool

    @property
    def kind(self) -> str:
        """``disk`` and ``whole`` are comparable among themselves, ``other`` is not."""
        kind, _, tag = self.identity.split(":")
        if kind == "disk":
            return kind
        return "whole" if kind == "bucket" and is_md5(tag) else "other"

    @property
    def num_bytes(self) -> int:
        return int(self.identity.split(":")[1])

    def may_match(self, other: _File) -> bool:
        """Whether two files of one size with different identities may have the same content."""
        return self.identity != other.identity and (self.kind != other.kind or self.kind == "other")


def _files(table: pa.Table) -> Iterator[_File]:
    for row in table.select(list(_FILE_COLUMNS)).to_pylist():
        yield _File(row["file"], row["where"], row["edges"], row["is_known"])


def _recognize(files: list[_File], limits: storage.Limits) -> dict[str, str | None]:
    """Maps the identity of each file to that of the known (or else first) file with the same content.

    None means that it may be a known file that cannot be read any more.
    """
    by_size: dict[int, dict[str, _File]] = {}
    for file in files:
        known = by_size.setdefault(file.num_bytes, {})
        if file.identity not in known or (known[file.identity].edges is None and file.edges is not None):
            known[file.identity] = file
    groups = [sorted(group.values(), key=_rank) for group in by_size.values()]
    compared = [_compared(group) for group in groups]
    edges = _read_edges([file for group in compared for file in group])
    names: dict[str, str | None] = {}
    for group, compared_files in zip(groups, compared, strict=True):
        names |= {file.identity: file.identity for file in group}
        names |= _names_of(compared_files, edges, limits)
    return names


def _rank(file: _File) -> tuple[bool, bool, str]:
    """Sorts files by preference for the identity to keep: known files first, then those with a tag of the content."""
    return not file.is_known, file.kind == "other", file.identity


def _compared(group: list[_File]) -> list[_File]:
    """The files of one size whose edges are needed: unknown files, and files that they may equal."""
    kinds = {(file.kind, file.is_known) for file in group}
    if all(is_known for _, is_known in kinds) or (len({kind for kind, _ in kinds}) == 1 and group[0].kind != "other"):
        return []
    unknown_files = [file for file in group if not file.is_known]
    kinds_of_strangers = {file.kind for file in unknown_files}
    kinds_of_others = {file.kind for file in group}

    def matters(file: _File) -> bool:
        others = kinds_of_strangers if file.is_known else kinds_of_others
        return bool(others - {file.kind}) or (file.kind == "other" and len(group) > 1)

    return [file for file in group if matters(file)]


def _read_edges(files: list[_File]) -> dict[str, str | None]:
    """The hashes of the files' edges, by identity; None for a file that cannot be read."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as readers:
        return dict(zip((file.identity for file in files), readers.map(_edges_of, files), strict=True))


def _edges_of(file: _File) -> str | None:
    if file.edges is not None:
        return file.edges
    if file.kind == "disk":
        return file.identity.split(":")[2]
    try:
        entry = storage.stat(file.where)
        if file_identity(file.where, entry.bytes, entry.etag) != file.identity:
            return None  # it is another file now
        return edges_sha256(file.where, entry.bytes)
    except (OSError, UserError) as error:
        is_away = isinstance(error, StorageUnavailable) and not isinstance(error, storage.Unreadable)
        if is_away and not file.is_known:
            raise
        return None


def _names_of(files: list[_File], edges: dict[str, str | None], limits: storage.Limits) -> dict[str, str | None]:
    """Like `_recognize`, for files of one size in the order of `_rank`."""
    names: dict[str, str | None] = {}
    by_edges: dict[str, str] = {}
    unseen = [file for file in files if file.is_known and edges[file.identity] is None]
    for file in files:
        seen = edges[file.identity]
        if file.is_known or seen is None:
            names[file.identity] = file.identity
            if seen is not None:
                by_edges.setdefault(seen, file.identity)
        elif seen in by_edges:
            names[file.identity] = by_edges[seen]
        else:
            names[file.identity] = _name_among(file, [other for other in unseen if file.may_match(other)], limits)
            by_edges[seen] = names[file.identity] or file.identity
    return names


def _name_among(file: _File, unseen: list[_File], limits: storage.Limits) -> str | None:
    """The identity of a file whose edges match no other file's; None if it may be one of the ``unseen`` files."""
    if not unseen:
        return file.identity
    whole = {other.identity for other in unseen if other.kind == "whole"}
    if whole:
        try:
            identity = f"bucket:{file.num_bytes}:{whole_md5(file.where, limits)}"
        except (FileNotFoundError, storage.Unreadable, storage.Refused):
            return None
        if identity in whole:
            return identity
    return file.identity if len(whole) == len(unseen) else None


# ------------------------------------------------------------------------------------------- known files


def listed_files(unknown_files: UnknownFiles, rows: Iterable[pa.Table], base_url: str) -> Iterator[pa.Table]:
    """The files of listed rows that an unknown file may equal, for `UnknownFiles.add_known`.

    Args:
        unknown_files: unknown files of the same listing.
        rows: tables with the source columns and ``file`` (see `file_column`).
        base_url: the folder that relative URLs refer to.
    """
    for table in rows:
        files = planned_identities(table)
        yield _chosen(unknown_files, table, files, base_url)[0]


def planned_files(unknown_files: UnknownFiles, plan: Plan, config: RunConfig) -> Iterator[pa.Table]:
    """The planned files that an unknown file may equal, with the edges that commit records state."""
    committed: dict[str, set[int]] = {}
    columns = ["split", "unit", "id", "url", "bytes", "etag", "member", "fault", "file"]
    for generation, table in plan.tables_by_generation(columns):
        if generation["kind"] == "listed":
            files = planned_identities(table)
            found, rows = _chosen(unknown_files, table, files, generation["base_url"])
            edges = _committed_edges(config, rows, found, committed)
            yield found.append_column("edges", pa.array(edges, _TEXT))


def _chosen(
    unknown_files: UnknownFiles, table: pa.Table, files: pa.ChunkedArray, base_url: str
) -> tuple[pa.Table, pa.Table]:
    """(``file``, ``size``, ``where``) of the rows that an unknown file may equal, and these rows."""
    files, sizes = _files_and_sizes(files)
    is_chosen = unknown_files.may_match(files, sizes) & pc.is_null(table["fault"]).to_numpy()
    mask = pa.array(is_chosen)
    rows = table.filter(mask)
    where = pa.array([storage.resolve(base_url, url) for url in rows["url"].to_pylist()], _TEXT)
    return pa.table({"file": files.filter(mask), "size": sizes.filter(mask), "where": where}), rows


def _committed_edges(
    config: RunConfig, rows: pa.Table, files: pa.Table, committed: dict[str, set[int]]
) -> list[str | None]:
    """The edges of each planned row's file from the commit records; None without. ``committed`` is filled on demand."""
    edges: dict[str, str | None] = {}
    is_open = pc.and_(pc.is_null(rows["member"]), pc.invert(pc.match_substring_regex(files["file"], _DISK)))
    wanted = rows.filter(is_open)
    pairs = sorted(set(zip(wanted["split"].to_pylist(), wanted["unit"].to_pylist(), strict=True)))
    for split, group in groupby(pairs, key=lambda pair: pair[0]):
        if split not in committed:
            committed[split] = set(committed_units(config.folder("clips", split)))
        units = [unit for _, unit in group if unit in committed[split]]
        for record in read_commits(config.folder("clips", split), units):
            edges |= {video["id"]: video.get("edges") for video in record["videos"]}
    return [edges.get(one) for one in rows["id"].to_pylist()]
