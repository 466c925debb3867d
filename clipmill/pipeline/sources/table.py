"""A list of videos: CSV, TSV, Parquet or JSON lines with a column of URLs, read row by row.

Storage is asked for the size and content tag of each file, several at a time in a bucket. A file that is not there is
listed all the same: the stage then excludes it with that cause, instead of dropping it in silence.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources.record import SourceVideo

__all__ = ["list_videos"]

_BLOCK_BYTES = 2**22
_REQUESTS_AT_ONCE = 32
_ROWS_AT_ONCE = 1024
_SPLITS: dict[str, Literal["train", "val"]] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "val",
}

Row = tuple[str, dict[str, Any]]
"""Where a row stands (``line 12``), and its cells by column."""


def list_videos(source: SourceConfig) -> Iterator[SourceVideo]:
    """The rows of a table.

    Raises:
        UserError: another kind of file, a column that is not there, a row that cannot be read, or none of the files
            exists.
    """
    url = storage.absolute(source.url)
    base = url.rsplit("/", 1)[0]
    suffix = PurePosixPath(url).suffix.lower()
    if suffix not in _READERS:
        raise UserError(f"data.source.url {url} must end in {', '.join(_READERS)} for data.source.type=table")
    named = {key: column for key, column in source.columns.model_dump().items() if column is not None}
    num_rows = num_missing = 0
    with ExitStack() as stack:
        file = stack.enter_context(storage.open_to_read(url, _BLOCK_BYTES))
        pool = stack.enter_context(ThreadPoolExecutor(_REQUESTS_AT_ONCE))
        try:
            rows = _READERS[suffix](file)
            while batch := list(islice(rows, _ROWS_AT_ONCE)):
                if not num_rows:
                    _check_columns(named, batch)
                cells = [_read_cells(named, row) for row in batch]
                urls = [storage.resolve(base, str(values["url"])) for values in cells]
                # A disk answers sooner than a thread is woken.
                entries = map(_find, urls) if all(map(storage.is_local, urls)) else pool.map(_find, urls)
                for values, entry in zip(cells, entries, strict=True):
                    num_rows += 1
                    num_missing += entry is None
                    yield _source_video(values, entry)
        except _BadRow as error:
            raise UserError(f"data.source.url {url}, {error}") from error
        except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
            raise UserError(f"data.source.url {url} cannot be read as {suffix}: {error}") from error
    if num_rows and num_rows == num_missing:
        raise UserError(f"none of the {num_rows} files that {url} names exists; relative names are sought in {base}")


class _BadRow(Exception):
    """The message begins with where the row stands."""


def _delimited(delimiter: str, file: Any) -> Iterator[Row]:
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    for cells in reader:
        place = f"line {reader.line_num}"
        if None in cells or None in cells.values():
            wanted = len(reader.fieldnames or ())
            raise _BadRow(f"{place}: not {wanted} cells, as in the first line; quote a cell that holds the delimiter")
        yield place, cells


def _json_lines(file: Any) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except ValueError as error:
            raise _BadRow(f"line {number}: no JSON ({error})") from error
        if not isinstance(cells, dict):
            raise _BadRow(f"line {number}: no JSON object")
        yield f"line {number}", cells


def _parquet(file: Any) -> Iterator[Row]:
    number = 0
    for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE):
        for cells in batch.to_pylist():
            number += 1
            yield f"row {number}", cells


_READERS: dict[str, Callable[[Any], Iterator[Row]]] = {
    ".csv": partial(_delimited, ","),
    ".tsv": partial(_delimited, "\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def _check_columns(named: dict[str, str], rows: list[Row]) -> None:
    """A JSON line may leave out what it has no value for: a column that none of the first rows has is misspelt."""
    found = dict.fromkeys(name for _, cells in rows for name in cells)
    for key, column in named.items():
        if column not in found:
            raise _BadRow(
                f"{rows[0][0]}: no column {column!r} (found: {', '.join(found)}); correct data.source.columns.{key}"
            )


def _read_cells(named: dict[str, str], row: Row) -> dict[str, str | None]:
    """The cells that mean something, by what they mean, and the others as ``metadata`` in JSON."""
    place, cells = row
    values = {key: str(cells[column]) for key, column in named.items() if cells.get(column) not in (None, "")}
    if "url" not in values:
        raise _BadRow(f"{place}: {named['url']} is empty")
    if values.get("split", "train") not in _SPLITS:
        raise _BadRow(
            f"{place}: {named['split']} is {values['split']!r}; it must be one of {', '.join(_SPLITS)}, or empty"
        )
    taken = set(named.values())
    metadata = {name: value for name, value in cells.items() if name not in taken}
    return {**values, "metadata": json.dumps(metadata, sort_keys=True, default=str) if metadata else None}


def _find(url: str) -> storage.Entry | None:
    try:
        return storage.stat(url)
    except FileNotFoundError:
        return None


def _source_video(values: dict[str, Any], entry: storage.Entry | None) -> SourceVideo:
    return SourceVideo(
        name=values["url"],
        bytes=0 if entry is None else entry.bytes,
        etag=None if entry is None else entry.etag,
        label=values.get("label"),
        actions=values.get("actions"),
        text=values.get("text"),
        split=_SPLITS[values["split"]] if "split" in values else None,
        metadata=values["metadata"],
        identity=f"missing:{values['url']}" if entry is None else None,
    )
