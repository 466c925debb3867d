"""Sorts tables larger than memory by a key, in scratch files.

Rows are collected until they fill a run. A run is sorted by the key and written as one record batch for each of 256
ranges of the key. Reading takes a range, or a few small ones, out of every run. So memory holds one run or one range,
and each row is written once: 100 million rows of 260 bytes make 400 runs and ranges of 100 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

__all__ = ["Spool", "write_options"]

RUN_ROWS = 2**18
_NUM_RANGES = 256
_FIRST_KEYS = np.arange(_NUM_RANGES, dtype=np.uint64) << np.uint64(56)


def write_options() -> pa.ipc.IpcWriteOptions:
    """Fast compression: names of one source have much in common, and most optional columns are empty."""
    return pa.ipc.IpcWriteOptions(compression="lz4")


class Spool:
    """Rows in scratch files, which are read back range by range.

    Attributes:
        num_rows: rows added so far.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Keeps files in ``folder``. ``key`` names a uint64 column with evenly spread values, such as a hash."""
        folder.mkdir()
        self._folder, self._key = folder, key
        self._gathered: list[pa.Table] = []
        self._num_gathered = 0
        self._runs: list[Path] = []
        self._counts = np.zeros(_NUM_RANGES, np.int64)
        self.num_rows = 0

    def add(self, table: pa.Table) -> None:
        """Adds rows; all tables have the same columns."""
        if not len(table):
            return
        self._gathered.append(table)
        self._num_gathered += len(table)
        self.num_rows += len(table)
        if self._num_gathered >= RUN_ROWS:
            self._write_run()

    def ranges(self) -> Iterator[pa.Table]:
        """Yields tables of ascending key ranges. Rows of equal key are in one table, in the order they were added."""
        if not self._runs:
            if self._gathered:
                yield pa.concat_tables(self._gathered).combine_chunks()
            return
        self._write_run()
        first = 0
        while first < _NUM_RANGES:
            end = first + 1
            while end < _NUM_RANGES and self._counts[first : end + 1].sum() <= RUN_ROWS:
                end += 1
            if self._counts[first:end].any():
                yield self._read(first, end)
            first = end

    def _write_run(self) -> None:
        if not self._gathered:
            return
        table = pa.concat_tables(self._gathered)
        self._gathered, self._num_gathered = [], 0
        keys = table[self._key].to_numpy()
        order = np.argsort(keys, kind="stable")
        table = table.take(pa.array(order)).combine_chunks()
        bounds = np.append(np.searchsorted(keys[order], _FIRST_KEYS), len(order))
        self._counts += np.diff(bounds)
        path = self._folder / f"{len(self._runs):06d}.arrow"
        with pa.ipc.new_file(path, table.schema, options=write_options()) as writer:
            for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                writer.write_batch(_one_batch(table.slice(first, end - first)))
        self._runs.append(path)

    def _read(self, first: int, end: int) -> pa.Table:
        batches = []
        for path in self._runs:
            with pa.OSFile(str(path)) as file:
                reader = pa.ipc.open_file(file)
                batches += [reader.get_batch(index) for index in range(first, end)]
        return pa.Table.from_batches(batches).combine_chunks()


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table as one batch, even if it is empty, for which `to_batches` gives none."""
    batches = table.to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)
