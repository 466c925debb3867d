from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipmill.pipeline.planning import spool


@pytest.mark.parametrize("run_rows", [10, 64, 5000])
def test_rows_come_back_in_ranges_of_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_rows: int) -> None:
    monkeypatch.setattr(spool, "RUN_ROWS", run_rows)
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, 1000, np.uint64)
    keys[::7] = keys[0]  # equal keys stay in the order in which they came
    keys[5], keys[6] = 0, 2**64 - 1
    rows = spool.Spool(tmp_path / "rows", "key")
    for first in range(0, 1000, 9):
        some = slice(first, first + 9)
        rows.add(pa.table({"key": keys[some], "number": np.arange(1000)[some]}))
    assert rows.num_rows == 1000
    for _ in range(2):  # they can be read again
        ranges = list(rows.ranges())
        assert (len(ranges) > 1) == (run_rows < 1000)
        bounds = [(table["key"].to_numpy().min(), table["key"].to_numpy().max()) for table in ranges]
        assert all(last < first for (_, last), (first, _) in pairwise(bounds))
        found = pa.concat_tables(ranges)
        order = np.argsort(found["key"].to_numpy(), kind="stable")
        assert found["number"].to_numpy()[order].tolist() == np.argsort(keys, kind="stable").tolist()
    rows.add(pa.table({"key": np.array([7], np.uint64), "number": [1000]}))
    assert sum(map(len, rows.ranges())) == 1001


def test_an_empty_spool_gives_nothing(tmp_path: Path) -> None:
    assert list(spool.Spool(tmp_path / "rows", "key").ranges()) == []
