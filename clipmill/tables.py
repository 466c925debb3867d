"""The rows of a table file, one after the other: CSV, TSV, JSON lines, Parquet.

Every cell has a name of its own: a table with two columns of one name is refused, and so is a JSON object with two
keys of one name. Columns without a name are called by their place.

A row that cannot be read is a row with a fault; the rows after it are read all the same. That takes care where quotes
do not match: a CSV reader would take all lines up to the next quote for one cell.

Bytes that are not UTF-8 are kept as Python's ``surrogateescape`` does; whoever needs the cell decides what they mean.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["SUFFIXES", "Row", "UnreadableTable", "read_rows"]

_BATCH_ROWS = 1024
_MOST_LINES = 1000
"""Of one record: further lines are not looked at for the end of a quoted cell."""

_UNCLOSED = "unexpected end of data"
"""What `csv` says of a quoted cell whose end has not been found."""


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        place: where it stands (``line 12``; of a record of several lines, the first).
        cells: by column, as far as they can be read.
        fault: why the row cannot be read; None where it can.
        raw: the text of a row with a fault.
    """

    place: str
    cells: dict[str, Any]
    fault: str | None = None
    raw: str = ""


class UnreadableTable(Exception):
    """The file as a whole is no such table."""


def read_rows(file: Any, suffix: str) -> Iterator[Row]:
    """The rows of a file.

    Args:
        file: opened for reading bytes.
        suffix: one of `SUFFIXES`.

    Raises:
        UnreadableTable: it is in another encoding, damaged, or has two columns of one name.
    """
    start = file.read(4)
    file.seek(0)
    if suffix != ".parquet" and start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableTable("the file is UTF-16; save it as UTF-8")
    return _READERS[suffix](file)


# -------------------------------------------------------------------------------------- CSV and TSV


class _Lines:
    """Lines of text with a look ahead."""

    def __init__(self, file: Any) -> None:
        self._lines = iter(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""))
        self._ahead: deque[str] = deque()
        self.number = 0

    def take(self) -> str | None:
        """The next line; None at the end."""
        line = self.peek(0)
        if line is not None:
            self._ahead.popleft()
            self.number += 1
        return line

    def peek(self, index: int) -> str | None:
        """A line that has not been taken; None behind the end."""
        while len(self._ahead) <= index:
            line = next(self._lines, None)
            if line is None:
                return None
            self._ahead.append(line)
        return self._ahead[index]


def _csv_rows(file: Any) -> Iterator[Row]:
    return _delimited_rows(file, lambda line, lines, _: _record(line, lines, ","), "quote a cell that holds a comma")


def _tsv_rows(file: Any) -> Iterator[Row]:
    return _delimited_rows(file, _tsv_record, "a cell may hold no tab")


def _delimited_rows(
    file: Any, read: Callable[[str, _Lines, int], tuple[list[str] | None, int]], advice: str
) -> Iterator[Row]:
    """Rows by the names in the first line.

    Args:
        file: opened for reading bytes.
        read: (line, lines behind it, number of columns) to (cells, or None where quotes do not match; number of
            further lines that it takes).
        advice: for rows with too few or too many cells.
    """
    csv.field_size_limit(2**31 - 1)  # captions of a megabyte exist; the process has no other use of it
    lines = _Lines(file)
    names: list[str] = []
    while (line := lines.take()) is not None:
        if not line.strip("\r\n"):
            continue
        place = f"line {lines.number}"
        cells, num_further = read(line, lines, len(names))
        for _ in range(num_further):
            lines.take()
        if not names:
            names = _column_names([name.strip() for name in cells or []])
            continue
        if cells is None:
            yield Row(place, {}, "its quotes do not match", line)
            continue
        while len(cells) > len(names) and not cells[-1]:
            del cells[-1]  # spreadsheets write empty cells beyond the last column
        found = dict(zip(names, cells, strict=False))
        if len(cells) == len(names):
            yield Row(place, found)
        else:
            fault = f"its cells are {len(cells)}, those of the first line {len(names)}; {advice}"
            yield Row(place, found, fault, line)


def _column_names(stated: list[str]) -> list[str]:
    """A name for each column.

    Raises:
        UnreadableTable: two columns have the same.
    """
    names = [name or f"column {place}" for place, name in enumerate(stated, start=1)]
    for name, num_columns in Counter(names).items():
        if num_columns > 1:
            raise UnreadableTable(f"{num_columns} columns are called {name!r}; rename all but one")
    return names


def _record(
    first: str, lines: _Lines, delimiter: str, may_follow: Callable[[str], bool] = lambda line: True
) -> tuple[list[str] | None, int]:
    """The cells of the record that begins with a line, by RFC 4180, and how many of the next lines belong to it.

    Cells are None where a quote is never closed, or is followed by something else than a delimiter. The lines behind
    the first are then records of their own.
    """
    text, line = first, first
    for num_further in range(_MOST_LINES):
        if not num_further or '"' in line:
            try:
                return next(csv.reader([text], delimiter=delimiter, strict=True)), num_further
            except csv.Error as error:
                if str(error) != _UNCLOSED:
                    break
        following = lines.peek(num_further)
        if following is None or not may_follow(following):
            break
        line = following
        text += line
    return None, 0


def _tsv_record(line: str, lines: _Lines, num_columns: int) -> tuple[list[str] | None, int]:
    """As `_record`, where a quote means itself unless the whole cell is quoted.

    Spreadsheets and pandas quote cells, other writers do not. A quoted cell goes on in the next line only where that
    line is no row by itself.
    """
    plain = line.strip("\r\n").split("\t")
    is_open = any(cell.startswith('"') and _unquoted(cell) == cell for cell in plain)
    if is_open or len(plain) != num_columns:
        quoted, num_further = _record(line, lines, "\t", lambda following: following.count("\t") + 1 != num_columns)
        if quoted is not None and len(quoted) == num_columns:
            return quoted, num_further
    return [_unquoted(cell) for cell in plain], 0


def _unquoted(cell: str) -> str:
    """The content of a cell that is quoted from its first to its last character; another cell as it is."""
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in cell[1:-1].replace('""', ""):
        return cell
    return cell[1:-1].replace('""', '"')


# --------------------------------------------------------------------------------------------- others


def _json_rows(file: Any) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
        if not text.strip():
            continue
        place = f"line {number}"
        try:
            cells = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            yield Row(place, {}, f"no JSON ({str(error)[:80]})", text)
            continue
        yield Row(place, cells) if isinstance(cells, dict) else Row(place, {}, "no JSON object", text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return values


def _parquet_rows(file: Any) -> Iterator[Row]:
    numbers = itertools.count(1)
    try:
        content = pq.ParquetFile(file)
        names = _column_names(content.schema_arrow.names)
        for batch in content.iter_batches(batch_size=_BATCH_ROWS):
            columns = [_values(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                yield Row(f"row {next(numbers)}", dict(zip(names, values, strict=True)))
    except (pa.ArrowException, OSError) as error:
        raise UnreadableTable(str(error).splitlines()[0]) from error


def _values(column: pa.Array) -> list[Any]:
    """As Python objects, also where one of them has no such form."""
    try:
        return column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):  # bytes that are not UTF-8, times beyond Python's
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    """A text, where a value has no other form; None where it has not even that."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        with suppress(pa.ArrowException, ValueError):
            return scalar.cast(pa.large_binary()).as_py().decode("utf-8", "surrogateescape")
    except (pa.ArrowException, ValueError, OverflowError):
        with suppress(pa.ArrowException, ValueError):
            return scalar.cast(pa.string()).as_py()
    return None


_READERS: dict[str, Callable[[Any], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}

SUFFIXES = tuple(_READERS)
"""Endings of the tables that can be read."""
