"""Reads the rows of a table file in order: CSV, TSV, JSON lines, Parquet.

Column names are unique: a table with two columns of one name is refused, and so is a JSON object with a repeated key.
Columns without a name are named by their position.

A row that cannot be read carries a fault, and reading continues with the next row. Unmatched quotes need care: a plain
CSV reader would read all lines up to the next quote as one cell.

Bytes that are not UTF-8 are kept with ``surrogateescape``; the user of a cell decides what they mean.
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
"""Maximum number of lines of one record; a quoted cell that does not end within them counts as unclosed."""

_UNCLOSED = "unexpected end of data"
"""The `csv` module's error for a quoted cell without an end."""


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        place: position in the file, such as ``line 12``; for a record of several lines, the first of them.
        cells: cells by column name, as far as they can be read.
        fault: why the row cannot be read; None if it can.
        raw: text of a row with a fault.
    """

    place: str
    cells: dict[str, Any]
    fault: str | None = None
    raw: str = ""


class UnreadableTable(Exception):
    """The file as a whole cannot be read as a table."""


def read_rows(file: Any, suffix: str) -> Iterator[Row]:
    """Yields the rows of a file.

    Args:
        file: file opened for reading bytes.
        suffix: one of `SUFFIXES`.

    Raises:
        UnreadableTable: the file has another encoding, is damaged, or has two columns of one name.
    """
    start = file.read(4)
    file.seek(0)
    if suffix != ".parquet" and start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableTable("the file is UTF-16; save it as UTF-8")
    return _READERS[suffix](file)


# -------------------------------------------------------------------------------------- CSV and TSV


class _Lines:
    """Lines of text with lookahead."""

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
        """The line at an index among the lines not taken yet; None beyond the end."""
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
    """Yields rows whose column names are in the first line.

    Args:
        file: file opened for reading bytes.
        read: parses a record: (line, following lines, number of columns) -> (cells, or None if quotes do not match;
            number of following lines that belong to the record).
        advice: what the user can do about rows with too few or too many cells.
    """
    csv.field_size_limit(2**31 - 1)  # captions of a megabyte exist; nothing else in the process uses this limit
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
            fault = f"it has {len(cells)} cells, but the first line has {len(names)}; {advice}"
            yield Row(place, found, fault, line)


def _column_names(stated: list[str]) -> list[str]:
    """A name for each column.

    Raises:
        UnreadableTable: two columns have the same name.
    """
    names = [name or f"column {place}" for place, name in enumerate(stated, start=1)]
    for name, num_columns in Counter(names).items():
        if num_columns > 1:
            raise UnreadableTable(f"{num_columns} columns are called {name!r}; rename all but one")
    return names


def _record(
    first: str, lines: _Lines, delimiter: str, may_follow: Callable[[str], bool] = lambda line: True
) -> tuple[list[str] | None, int]:
    """Parses the record that begins with a line, by RFC 4180: its cells, and how many following lines belong to it.

    Cells are None if a quote is never closed or is not followed by a delimiter. The following lines then count as
    separate records.
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
    """As `_record`, but a quote is an ordinary character unless it encloses the whole cell.

    Spreadsheets and pandas quote cells, other writers do not. A quoted cell continues on the next line only if that
    line does not have the number of cells of a row.
    """
    plain = line.strip("\r\n").split("\t")
    is_open = any(cell.startswith('"') and _unquoted(cell) == cell for cell in plain)
    if is_open or len(plain) != num_columns:
        quoted, num_further = _record(line, lines, "\t", lambda following: following.count("\t") + 1 != num_columns)
        if quoted is not None and len(quoted) == num_columns:
            return quoted, num_further
    return [_unquoted(cell) for cell in plain], 0


def _unquoted(cell: str) -> str:
    """Removes the quotes of a cell that is quoted from its first to its last character; returns others unchanged."""
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
            yield Row(place, {}, f"it is not JSON ({str(error)[:80]})", text)
            continue
        yield Row(place, cells) if isinstance(cells, dict) else Row(place, {}, "it is not a JSON object", text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
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
    """A column as Python objects; values that Python cannot represent become text or None (`_value`)."""
    try:
        return column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):  # bytes that are not UTF-8, times beyond Python's
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    """A value as a Python object, else as text, else None."""
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
"""Suffixes of the table files that can be read."""
