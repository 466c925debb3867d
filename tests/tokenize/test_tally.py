"""What a resume of ``tokenize`` reads: segments of the tally, and the records behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill.tokenize.tally import Tally, pack_counts, unpack_counts

NUM_CODES = 50


def record(unit: int) -> dict[str, Any]:
    counts = np.random.default_rng(unit).integers(0, 2**40, NUM_CODES)
    sha256 = f"{unit:064x}"
    part = {"name": f"tokens-{unit:06d}-00.tar", "bytes": 1, "sha256": sha256, "index_sha256": sha256, "samples": 3}
    return {
        "unit": unit,
        "parts": [part],
        "clips": [f"clips-{unit:06d}-00.tar"],
        "num_clips": 3,
        "fields": {"actions": {"clips": 2, "shapes": [[8, 2]]}},
        "versions": {"torch": "2"},
        "tokenizer": "0" * 8,
        "precision": "float32",
        "condition_frames": 0,
        "code_counts": pack_counts(counts),
    }


def tally_of(folder: Path, *units: int) -> Tally:
    tally = Tally(str(folder), NUM_CODES, 1)
    for unit in units:
        tally.add(record(unit))
    return tally


def sums_of(tally: Tally) -> tuple[Any, ...]:
    return tally.num_clips, tally.code_counts.tolist(), tally.fields, tally.versions, tally.parts


@pytest.mark.parametrize("counts", [[], [0], [1, 2**62], list(range(65_536))])
def test_counts_are_packed_without_loss(counts: list[int]) -> None:
    array = np.array(counts, np.int64)
    np.testing.assert_array_equal(unpack_counts(pack_counts(array)), array)
    assert len(pack_counts(array)) < 2 * len(str(counts)) + 50


@pytest.mark.parametrize("text", ["", "?", "AAAA", pack_counts(np.arange(5))[:-8]])
def test_damaged_counts_are_told(text: str) -> None:
    with pytest.raises(ValueError, match="packed counts are damaged"):
        unpack_counts(text)


def test_segments_bring_the_sums_back(tmp_path: Path) -> None:
    whole = tally_of(tmp_path / "other", *range(5))
    first = tally_of(tmp_path, 0, 1)
    first.publish()
    for unit in (2, 3):
        first.add(record(unit))
    first.publish()
    first.publish()  # nothing is new
    assert sorted(path.name for path in (tmp_path / "tally").iterdir()) == ["000001.json", "000002.json"]
    again = Tally(str(tmp_path), NUM_CODES, 1)
    assert [facts["unit"] for facts in again.read_segments(range(5))] == [0, 1, 2, 3]
    again.add(record(4))
    assert sums_of(again) == sums_of(whole)


def test_a_segment_that_does_not_fit_is_not_believed(tmp_path: Path) -> None:
    tally = tally_of(tmp_path, 0, 1)
    tally.publish()
    tally.add(record(2))
    tally.publish()
    (tmp_path / "tally" / "000003.json").write_text('{"schema": 1, "units": [], "code_counts": "AAAA"}')
    again = Tally(str(tmp_path), NUM_CODES, 1)
    assert [facts["unit"] for facts in again.read_segments([0, 2])] == [2]  # the record of unit 1 was lost
    assert sums_of(again) == sums_of(tally_of(tmp_path / "other", 2))
    assert [path.name for path in (tmp_path / "tally").iterdir()] == ["000002.json"]
    again.add(record(0))
    again.publish()
    last = Tally(str(tmp_path), NUM_CODES, 1)
    assert [facts["unit"] for facts in last.read_segments([0, 2])] == [2, 0]


def test_units_of_two_segments_count_once(tmp_path: Path) -> None:
    tally_of(tmp_path, 0, 1).publish()
    tally_of(tmp_path, 1, 2).publish()  # of a run that was taken over
    again = Tally(str(tmp_path), NUM_CODES, 1)
    assert [facts["unit"] for facts in again.read_segments(range(3))] == [0, 1]
    again.add(record(2))
    assert sums_of(again) == sums_of(tally_of(tmp_path / "other", 0, 1, 2))
