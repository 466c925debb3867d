"""Clips that trainings leave out: what readers of a manifest see then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipmill.errors import UserError
from clipmill.shards.commits import commit_unit
from clipmill.shards.dataset import ShardDataset, decode_codes, train_batches
from clipmill.shards.exclusions import ExcludedClip, exclude, read_exclusions
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest
from tests.shards.folders import write_parts

COUNTS = [5, 0, 12, 3]
CLIPS = ["clips-000000-00-aaaaaaaa.tar", "", "clips-000002-00-bbbbbbbb.tar", "clips-000003-00-cccccccc.tar"]


@pytest.fixture
def tokens(tmp_path: Path) -> Manifest:
    """Units of several shards, each made of a shard of clips."""
    url = str(tmp_path / "tokens")
    for unit, count in enumerate(COUNTS):
        parts = write_parts(tmp_path / f"unit{unit}", unit, count, 16384)
        commit_unit(url, unit, parts, {"clips": [CLIPS[unit]] if count else []})
    return freeze(url, "tokens", range(4), {}, {"num_units": 4})


def keys_of(manifest: Manifest, cache: Path) -> list[str]:
    dataset = ShardDataset(manifest, decode_codes, cache)
    return [dataset[index]["key"] for index in range(len(dataset))]


def key(unit: int, row: int) -> str:
    return f"{unit:016x}_{row:06d}"


def clip(unit: int, row: int, shard: str | None = None) -> ExcludedClip:
    return ExcludedClip(key(unit, row), shard or CLIPS[unit], row)


def test_readers_see_the_other_samples_in_their_order(tokens: Manifest, tmp_path: Path) -> None:
    assert len(tokens.shards) > 3
    gone = [clip(0, 0), clip(0, 1), clip(2, 3), clip(2, 4), clip(2, 11), clip(3, 0), clip(3, 1), clip(3, 2)]
    left = exclude(tokens, gone)
    names = {each.key for each in gone}
    expected = [key for key in keys_of(tokens, tmp_path / "cache") if key not in names]
    assert keys_of(left, tmp_path / "cache") == expected
    assert (left.num_samples, left.counts.sum(), left.num_stored) == (12, 12, 20)
    assert len({tokens.fingerprint, left.fingerprint, exclude(tokens, gone[1:]).fingerprint}) == 3
    assert exclude(tokens, gone[::-1]).fingerprint == left.fingerprint


def test_an_epoch_of_training_holds_each_other_sample_once(tokens: Manifest, tmp_path: Path) -> None:
    dataset = ShardDataset(exclude(tokens, [clip(2, 5), clip(0, 4)]), decode_codes, tmp_path / "cache")
    order = dataset.order(seed=3, global_batch=6, window=4)
    batches = train_batches(
        dataset, order, global_batch=6, micro_batch=None, rank=0, world_size=1, first_step=0, num_workers=0
    )
    seen = [key for _ in range(3) for batch in next(batches) for key in batch["key"]]
    assert len(seen) == len(set(seen)) == 18
    assert not {key(2, 5), key(0, 4)} & set(seen)


def test_clips_of_another_data_set_are_not_taken_for_these(tokens: Manifest) -> None:
    others = [
        clip(2, 0, "clips-000002-00-dddddddd.tar"),
        clip(3, 99),
        ExcludedClip("x", "clips-000009-00-aaaaaaaa.tar", 0),
    ]
    assert exclude(tokens, others) is tokens


def test_clips_are_found_by_the_shards_that_hold_them(tmp_path: Path) -> None:
    url = str(tmp_path / "clips")
    commit_unit(url, 0, write_parts(tmp_path / "unit", 0, 9, 16384), {})
    frozen = freeze(url, "tokens", [0], {}, {"num_units": 1})
    clips = Manifest(url, "clips", frozen.shards, 9, frozen.fingerprint, {}, frozen.facts)
    left = exclude(clips, [ExcludedClip(key(0, 7), clips.shards[0].name, 7)])
    assert {number: rows.tolist() for number, rows in left.excluded.items()} == {
        len(clips.shards) - 1: [7 - int(clips.counts[:-1].sum())]
    }


def test_a_file_is_read_and_its_lines_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "excluded.jsonl"
    line = json.dumps({"key": "a", "shard": CLIPS[0], "row": 4, "like": "b"})
    path.write_text(f"{line}\n\n")
    assert read_exclusions(str(path)) == [ExcludedClip("a", CLIPS[0], 4)]
    for bad in (
        "a",
        "[]",
        "3",
        json.dumps({"key": "a", "shard": CLIPS[0]}),
        line.replace("4", "-4"),
        line.replace("clips-", ""),
    ):
        path.write_text(f"{line}\n{bad}\n")
        with pytest.raises(UserError, match="line 2 of"):
            read_exclusions(str(path))
    with pytest.raises(UserError, match="no file"):
        read_exclusions(str(tmp_path / "other"))


def test_rows_of_kept_samples_by_hand() -> None:
    manifest = Manifest("", "tokens", (), 0, "", {}, {}, {0: np.array([0, 3, 4, 8])})
    assert [manifest.stored_row(0, row) for row in range(6)] == [1, 2, 5, 6, 7, 9]
    assert manifest.stored_row(1, 3) == 3
