"""A list of videos: CSV, TSV, Parquet or JSON lines with a column of URLs, read row by row.

Size and content tag of each file are requested from its storage, several at a time in a bucket. A row without a video,
or with one that cannot be read, is listed with a fault. The stage then excludes it with that cause, instead of dropping
it silently or stopping.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Literal

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import StorageUnavailable, UserError
from clipmill.pipeline.sources.cells import BadCell, as_caption, as_seconds, as_text, check_unicode, metadata_json
from clipmill.pipeline.sources.record import SourceVideo
from clipmill.tables import SUFFIXES, Row, UnreadableTable, read_rows

__all__ = ["first_names", "list_videos"]

_BLOCK_BYTES = 2**22
_REQUESTS_AT_ONCE = 32
_ROWS_AT_ONCE = 1024
_MOST_REFUSALS = 1000
"""Rows that a server may refuse before the first success; after that it is given up, as with wrong credentials."""
_SPLITS: dict[str, Literal["train", "val"]] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "val",
}


def list_videos(source: SourceConfig, after: str | None = None) -> Iterator[SourceVideo]:
    """Yields the rows of a table.

    Args:
        source: the source to list.
        after: a mark, ``rows:faults``: the number of rows that were read, and of those with a fault. None reads all
            rows.

    Raises:
        UserError: the file is not a table, lacks a configured column, or no row gives a video.
    """
    url = storage.absolute(source.url)
    base, table_name = storage.split(url)
    suffix = _suffix(url)
    columns = {key: column for key, column in source.columns.model_dump().items() if column is not None}
    num_rows, num_faults = map(int, (after or "0:0").split(":"))
    fault = ""
    is_checked = after is not None
    with ExitStack() as stack:
        file = stack.enter_context(storage.open_to_read(url, _BLOCK_BYTES))
        find = _Finder(base, stack.enter_context(ThreadPoolExecutor(_REQUESTS_AT_ONCE)))
        try:
            rows = islice(read_rows(file, suffix), num_rows, None)
            while batch := list(islice(rows, _ROWS_AT_ONCE)):
                if not is_checked:
                    is_checked = _check_columns(url, columns, batch)
                last_row = num_rows + len(batch)
                for video in find([_video_of(columns, row, table_name) for row in batch]):
                    num_rows += 1
                    if video.fault is not None:
                        num_faults += 1
                        fault = fault or video.fault
                    yield replace(video, mark=f"{num_rows}:{num_faults}") if num_rows == last_row else video
        except UnreadableTable as error:
            raise UserError(f"data.source.url {storage.shown(url)} cannot be read as {suffix}: {error}") from error
    if num_rows and num_rows == num_faults:
        raise UserError(
            f"none of the {num_rows} rows of {storage.shown(url)} gives a video; the first has this fault: {fault} "
            f"(relative names refer to {storage.shown(base)})"
        )


def first_names(source: SourceConfig, num_rows: int) -> list[str]:
    """The names or URLs in the first rows; rows without one are skipped."""
    url = storage.absolute(source.url)
    with storage.open_to_read(url, _BLOCK_BYTES) as file:
        names = []
        for row in islice(read_rows(file, _suffix(url)), num_rows):
            with suppress(BadCell):
                names.append(_name(row, source.columns.url))
        return names


def _suffix(url: str) -> str:
    suffix = PurePosixPath(storage.split(url)[1]).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"data.source.url {storage.shown(url)} must end in {', '.join(SUFFIXES)} for data.source.type=table"
        )
    return suffix


def _check_columns(url: str, columns: dict[str, str], rows: list[Row]) -> bool:
    """Raises `UserError` for a column that none of the first rows has. A single JSON line may omit a column.

    Returns:
        Whether there was a row to check.
    """
    found = dict.fromkeys(name for row in rows for name in row.cells)
    for key, column in columns.items() if found else ():
        if column not in found:
            raise UserError(
                f"data.source.url {storage.shown(url)} has no column {column!r} (found: {', '.join(found)}); "
                f"correct data.source.columns.{key}"
            )
    return bool(found)


def _video_of(columns: dict[str, str], row: Row, table_name: str) -> SourceVideo:
    """The video of a row, before its file is checked. An invalid row gives a video with a fault."""
    place = f"{table_name}#{row.place.replace(' ', '=')}"
    try:
        return _described(columns, row, place)
    except (BadCell, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        fault = f"{row.place}: {str(error).partition(chr(10))[0] or type(error).__name__}"
        return SourceVideo(place, 0, None, fault=fault, identity=f"fault:{place}:{row.raw}")


def _described(columns: dict[str, str], row: Row, place: str) -> SourceVideo:
    try:
        name = _name(row, columns["url"])
    except BadCell as bad:
        fault = row.fault or f"{columns['url']} {bad}"
        return _faulty(SourceVideo(place, 0, None), f"{row.place}: {fault}", row)
    video = SourceVideo(name, 0, None)
    if row.fault is not None:
        return _faulty(video, f"{row.place}: {row.fault}", row)
    values: dict[str, Any] = {}
    for key, column in columns.items():
        try:
            values[key] = _READ[key](row, column) if key in _READ else as_text(row.cells.get(column))
        except BadCell as bad:
            return _faulty(video, f"{row.place}: {column} {bad}", row)
    start, end = values.pop("start", None), values.pop("end", None)
    if end is not None and end <= (start or 0):
        return _faulty(video, f"{row.place}: the span ends at {end:g} s, before it begins at {start or 0:g} s", row)
    taken = set(columns.values())
    if isinstance(row.cells.get(columns.get("text", "")), list):
        taken.remove(columns["text"])  # only the first of the captions is the text
    others = {name: value for name, value in row.cells.items() if name not in taken}
    try:
        metadata = metadata_json(others)
    except BadCell as bad:
        return _faulty(video, f"{row.place}: a cell {bad}", row)
    return replace(
        video,
        label=values.get("label"),
        text=values.get("text"),
        actions=values.get("actions"),
        split=values.get("split"),
        group=values.get("group"),
        start_seconds=start,
        end_seconds=end,
        metadata=metadata,
    )


def _name(row: Row, column: str) -> str:
    """A file's name or URL. It may contain any bytes, which are those of the name on the disk."""
    value = row.cells.get(column)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    name = value if isinstance(value, str) else as_text(value)
    if not name or not name.strip():
        raise BadCell("is empty")
    if "\0" in name:
        raise BadCell("holds a zero byte")
    name = storage.escape(name)
    check_unicode(name)
    return name


def _optional_name(row: Row, column: str) -> str | None:
    return None if as_text(row.cells.get(column)) is None else _name(row, column)


def _split(row: Row, column: str) -> Literal["train", "val"] | None:
    name = as_text(row.cells.get(column))
    if name is None:
        return None
    if name.lower() not in _SPLITS:
        raise BadCell(f"is {name[:40]!r}; it must be one of {', '.join(_SPLITS)}, or empty")
    return _SPLITS[name.lower()]


_READ = {
    "url": _name,
    "actions": _optional_name,
    "split": _split,
    "text": lambda row, column: as_caption(row.cells.get(column)),
    "start": lambda row, column: as_seconds(row.cells.get(column)),
    "end": lambda row, column: as_seconds(row.cells.get(column)),
}
"""Readers of the cells of special columns; all other columns are plain text."""


def _faulty(video: SourceVideo, fault: str, row: Row) -> SourceVideo:
    """Adds a fault. The identity is the row's content, so it does not depend on the row's position in the table."""
    return replace(video, fault=fault, identity=f"fault:{row.raw or row.cells!a}")


class _Finder:
    """Looks up the files of rows in storage, several at a time."""

    def __init__(self, base: str, pool: ThreadPoolExecutor) -> None:
        self._base, self._pool = base, pool
        self._lost: dict[str, str] = {}  # servers that are given up, with the reason: a dead one costs seconds per row
        self._answered: set[str] = set()
        self._refused: Counter[str] = Counter()

    def __call__(self, videos: list[SourceVideo]) -> Iterator[SourceVideo]:
        """The same videos with size and content tag, or a fault."""
        # A disk is faster than waking a thread.
        is_near = storage.is_local(self._base) and not any("://" in video.name for video in videos)
        return map(self._find, videos) if is_near else self._pool.map(self._find, videos)

    def _find(self, video: SourceVideo) -> SourceVideo:
        if video.fault is not None:
            return video
        name = storage.shown(video.name)
        try:
            for spelling in _spellings(video.name):
                with suppress(FileNotFoundError):
                    entry = self._stat(storage.resolve(self._base, spelling))
                    return replace(video, name=spelling, bytes=entry.bytes, etag=entry.etag)
            fault = f"{name} is missing"
        except (OSError, ValueError, UserError) as error:
            if isinstance(error, StorageUnavailable) and not isinstance(error, storage.Unreadable):
                raise  # a bucket is unreachable
            fault = str(error).splitlines()[0]
        return replace(video, fault=fault, identity=f"fault:{name}")

    def _stat(self, url: str) -> storage.Entry:
        server = storage.server(url)
        if server in self._lost:
            raise OSError(self._lost[server])
        try:
            entry = storage.stat(url)
        except (storage.Unreadable, UserError) as error:
            self._refused[server] += server not in self._answered
            if isinstance(error, storage.ServerLost) or self._refused[server] > _MOST_REFUSALS:
                self._lost[server] = f"{server.rpartition('@')[2]} was given up: {error}"
            raise
        self._answered.add(server)
        return entry


def _spellings(name: str) -> Iterator[str]:
    r"""The names that a cell may mean: unchanged, without surrounding spaces, or with its backslashes taken literally.

    A name on a disk may end in a space, and may contain text that looks like an escaped byte (``caf\xe9``).
    """
    if storage.is_web(name.strip()):
        yield name.strip()
        return
    yield from dict.fromkeys((name, name.strip(), storage.escape_name(name), storage.escape_name(name.strip())))
