"""Cuts the videos of a generation into units and writes its rows, as a stream over scratch files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.config import ClipConfig
from clipmill.pipeline.plan import PLAN_COLUMNS
from clipmill.pipeline.planning.spool import write_options
from clipmill.pipeline.planning.yields import Yield
from clipmill.shards.manifest import SPLITS

__all__ = ["Draft", "UnitCutter", "unit_goal", "write_units"]

_BATCH_ROWS = 2**16
_GROUP_ROWS = 2**15
"""Least rows of a row group: few groups for a reader of all rows, and not too many rows for a reader of one unit."""

_MOST_VIDEOS = 10_000
"""The most videos in a unit, because a killed unit is repeated."""

_LEAST_OUTPUT_BYTES, _FEWEST_UNITS = 2**20, 4
"""A small data set is cut into ``_FEWEST_UNITS`` units, as long as each makes at least ``_LEAST_OUTPUT_BYTES``."""


class Draft:
    """The videos of a generation in scratch files, one per split, in the order of the plan.

    Videos are added inside the ``with`` block and read after it.

    Attributes:
        num_videos: number of videos by split.
        num_bytes: bytes of source by split.
    """

    def __init__(self, folder: Path) -> None:
        """Keeps files in ``folder``."""
        folder.mkdir()
        self._columns = {name: kind for name, kind in PLAN_COLUMNS.items() if name not in ("split", "unit", "ordinal")}
        self._paths = {split: folder / f"{split}.arrow" for split in SPLITS}
        schema = pa.schema(self._columns)
        self._writers = {
            split: pa.ipc.new_file(path, schema, options=write_options()) for split, path in self._paths.items()
        }
        self.num_videos = dict.fromkeys(SPLITS, 0)
        self.num_bytes = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def add(self, split: str, table: pa.Table) -> None:
        """Appends videos; the columns are those of the plan except split, unit and ordinal."""
        if len(table):
            self._writers[split].write_table(table.select(list(self._columns)), _BATCH_ROWS)
            self.num_videos[split] += len(table)
            self.num_bytes[split] += int(np.sum(table["bytes"].to_numpy()))

    def tables(self, *splits: str) -> Iterator[pa.Table]:
        """The videos of these splits, one after the other."""
        for split in splits:
            with pa.OSFile(str(self._paths[split])) as file:
                reader = pa.ipc.open_file(file)
                for index in range(reader.num_record_batches):
                    yield pa.Table.from_batches([reader.get_batch(index)])


class UnitCutter:
    """Cuts the ordered videos of one split into units.

    All units make about the same bytes of shards, close to ``goal``, so that none is a small rest. A unit closes before
    the video that would exceed ``unit_bytes`` of source or `_MOST_VIDEOS`; it holds at least one video.

    Attributes:
        num_units: units so far.
    """

    def __init__(self, total: float, goal: float, unit_bytes: int) -> None:
        """Cuts videos that make ``total`` bytes of shards."""
        self._total, self._unit_bytes = total, unit_bytes
        self._num_shares = max(1, round(total / goal))
        self._made = 0.0
        self._ordinal = self._filled = self._last_share = 0
        self.num_units = 0

    def cut(self, sizes: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The unit, int32[n], and the ordinal in it, int32[n], of the next n videos.

        Args:
            sizes: int64[n], bytes of source to read.
            outputs: float64[n], expected bytes of shards.
        """
        ends = np.cumsum(np.concatenate([[self._made], outputs]))[1:]
        shares = ((ends - outputs / 2) * self._num_shares // (self._total or 1.0)).clip(0, self._num_shares - 1)
        self._made = float(ends[-1]) if len(ends) else self._made
        units, ordinals = np.empty(len(sizes), np.int32), np.empty(len(sizes), np.int32)
        rows = zip(sizes.tolist(), shares.astype(np.int64).tolist(), strict=True)
        for row, (size, share) in enumerate(rows):
            is_full = self._filled + size > self._unit_bytes or self._ordinal == _MOST_VIDEOS
            if not self.num_units or share != self._last_share or is_full:
                self.num_units += 1
                self._ordinal, self._filled, self._last_share = 0, 0, share
            units[row], ordinals[row] = self.num_units - 1, self._ordinal
            self._ordinal, self._filled = self._ordinal + 1, self._filled + size
        return units, ordinals


def unit_goal(total: float, shard_bytes: int) -> float:
    """Target bytes of shards per unit of a data set that makes ``total``; less for a small one."""
    return min(shard_bytes, max(_LEAST_OUTPUT_BYTES, total / _FEWEST_UNITS))


def write_units(
    path: Path,
    draft: Draft,
    expected: Yield,
    clip: ClipConfig,
    *,
    unit_bytes: int,
    shard_bytes: int,
    first_units: dict[str, int],
) -> tuple[dict[str, int], float]:
    """Writes a generation's rows.

    Args:
        path: path of the new Parquet file.
        draft: the rows.
        expected: the expected bytes of shards.
        clip: the clip rule.
        unit_bytes: the most bytes of source in a unit.
        shard_bytes: target bytes of shards of a unit.
        first_units: number of the first unit of each split.

    Returns:
        Units of each split; expected bytes of shards in all.
    """
    totals = {split: float(sum(expected.of(table, clip).sum() for table in draft.tables(split))) for split in SPLITS}
    total = sum(totals.values())
    goal = unit_goal(total, shard_bytes)
    num_units: dict[str, int] = {}
    with pq.ParquetWriter(path, pa.schema(PLAN_COLUMNS)) as writer:
        for split in SPLITS:
            cutter = UnitCutter(totals[split], goal, unit_bytes)
            _write_groups(writer, _cut_tables(draft, split, cutter, expected, clip, first_units[split]))
            num_units[split] = cutter.num_units
    return num_units, total


def _cut_tables(
    draft: Draft, split: str, cutter: UnitCutter, expected: Yield, clip: ClipConfig, first_unit: int
) -> Iterator[pa.Table]:
    last_url = None
    for table in draft.tables(split):
        urls = pa.concat_arrays([pa.array([last_url], pa.large_string()), table["url"].combine_chunks()])
        last_url = urls[-1].as_py()
        sizes = np.where(_repeats_file(table, urls), 0, table["bytes"].to_numpy())
        units, ordinals = cutter.cut(sizes, expected.of(table, clip))
        columns: dict[str, Any] = {
            "split": pa.repeat(split, len(table)),
            "unit": units + np.int32(first_unit),
            "ordinal": ordinals,
            **{name: table[name] for name in table.column_names},
        }
        yield pa.table(columns, pa.schema(PLAN_COLUMNS))


def _repeats_file(table: pa.Table, urls: pa.Array) -> np.ndarray:
    """bool[n]: whether a video is another span of the same file as the video before it, so that the file is fetched
    once.

    Args:
        table: n rows.
        urls: n + 1 URLs: that of the row before the table, then those of the rows.
    """
    repeats = np.zeros(len(table), bool)
    if table["start_seconds"].null_count + table["end_seconds"].null_count < 2 * len(table):
        codes = urls.dictionary_encode().indices.to_numpy(zero_copy_only=False)
        repeats = codes[1:] == codes[:-1]
    return repeats


def _write_groups(writer: pq.ParquetWriter, tables: Iterator[pa.Table]) -> None:
    """Writes row groups that end where a unit ends."""
    pending = pa.schema(PLAN_COLUMNS).empty_table()
    for table in tables:
        pending = pa.concat_tables([pending, table])
        units = pending["unit"].to_numpy()
        num_complete = int(np.searchsorted(units, units[-1]))  # rows of units that cannot continue in the next table
        if num_complete >= _GROUP_ROWS:
            writer.write_table(pending.slice(0, num_complete), num_complete)
            pending = pending.slice(num_complete)
    if len(pending):
        writer.write_table(pending, len(pending))
