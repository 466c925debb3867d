from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clipmill.errors import UserError
from clipmill.shards.dataset import MixedDataset, ShardDataset, decode_codes, eval_batches, train_batches
from tests.shards.folders import write_dataset

COUNTS = [[5, 0, 12, 3], [0], [9, 4]]
SLOTS = np.array([500, 200, 300])


def open_parts(tmp_path, counts):
    manifests = [write_dataset(tmp_path / f"part{i}", tmp_path / f"scratch{i}", part) for i, part in enumerate(counts)]
    return [ShardDataset(manifest, decode_codes, tmp_path / "cache") for manifest in manifests]


@pytest.fixture
def mixed(tmp_path):
    return MixedDataset(open_parts(tmp_path, COUNTS[::2]), np.array([700, 300]))


def take(mixed, num_steps, *, first_step=0, global_batch=20, **changes):
    arguments = {"micro_batch": None, "rank": 0, "world_size": 1, "num_workers": 0, **changes}
    order = mixed.order(3, global_batch, 4)
    batches = train_batches(mixed, order, global_batch=global_batch, first_step=first_step, **arguments)
    return list(itertools.islice(batches, num_steps))


def served(steps):
    """Key and codes (which name their video and clip) of the rows that count, of each step."""
    rows = []
    for step in steps:
        each = [zip(batch["key"], batch["codes"], batch["weight"].tolist(), strict=True) for batch in step]
        rows.append([(key, codes.tolist()) for key, codes, weight in itertools.chain(*each) if weight])
    return rows


def test_a_batch_holds_each_data_set_s_share_first_to_last(mixed):
    shards = [set(range(3)), {3, 4}]
    order = mixed.order(3, 20, 4)
    for step in range(50):
        found = order.locate(order.batch_positions(step, 20))[0].tolist()
        first = sum(shard in shards[0] for shard in found)
        assert all(shard in shards[int(row >= first)] for row, shard in enumerate(found))
        assert 13 <= first <= 15


def test_rows_of_several_data_sets_in_any_order(mixed):
    samples = mixed.read_rows(np.array([3, 0, 3]), np.array([0, 1, 2]))
    assert [each["key"] for each in samples] == [
        mixed.datasets[1].read(0, 0)["key"],
        mixed.datasets[0].read(0, 1)["key"],
        mixed.datasets[1].read(0, 2)["key"],
    ]


def test_world_sizes_micro_batches_workers_and_resume_change_nothing(mixed):
    whole = served(take(mixed, 6))
    assert all(len(step) == 20 for step in whole)
    for world_size in (2, 3, 4, 6, 8, 16):
        ranks = [served(take(mixed, 6, rank=r, world_size=world_size, micro_batch=2)) for r in range(world_size)]
        assert [list(itertools.chain(*(rank[step] for rank in ranks))) for step in range(6)] == whole
    assert served(take(mixed, 2, first_step=4)) == whole[4:]
    assert served(take(mixed, 6, num_workers=1)) == whole


def test_every_sample_of_a_data_set_comes_once_in_each_of_its_epochs(mixed):
    times = [Counter(), Counter()]
    order = mixed.order(3, 20, 4)
    for step, rows in enumerate(served(take(mixed, 50))):  # 1,000 positions
        shards = order.locate(order.batch_positions(step, 20))[0]
        for shard, (key, _) in zip(shards.tolist(), rows, strict=True):
            times[int(shard >= 3)][key] += 1
    for part, seen, slots in zip(mixed.datasets, times, (700, 300), strict=True):
        assert seen.keys() == {part[index]["key"] for index in range(len(part))}
        assert seen.total() == slots
        assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize(("world_size", "max_samples"), [(1, None), (3, None), (2, 10), (1, 3), (1, 1000)])
def test_evaluation_goes_through_one_data_set_after_the_other(tmp_path, world_size, max_samples):
    mixed = MixedDataset(open_parts(tmp_path, COUNTS), SLOTS)
    ranks = [
        list(eval_batches(mixed, batch_size=4, rank=rank, world_size=world_size, max_samples=max_samples))
        for rank in range(world_size)
    ]
    keys = [
        key
        for rank in ranks
        for batch in rank
        for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True)
        if weight
    ]
    shares = {None: (20, 0, 13), 1000: (20, 0, 13), 10: (6, 0, 4), 3: (2, 0, 1)}[max_samples]
    assert keys == [
        part[index]["key"] for part, share in zip(mixed.datasets, shares, strict=True) for index in range(share)
    ]


def test_an_evaluation_finds_the_clips_beside_a_large_part_without_any(tmp_path):
    mixed = MixedDataset(open_parts(tmp_path, [[0], [9, 4]]), np.array([990, 10]))
    (batch,) = eval_batches(mixed, batch_size=4, rank=0, world_size=1, max_samples=4)
    assert batch["key"] == [mixed.datasets[1][index]["key"] for index in range(4)]
    assert batch["weight"].tolist() == [1, 1, 1, 1]


def test_damage_in_a_part_names_its_shard(mixed):
    manifest = mixed.datasets[1].manifest
    name = manifest.shards[0].name
    Path(manifest.url, name).unlink()
    with pytest.raises(UserError, match=f"{name} of .*part1: .*does not exist"):
        take(mixed, 3)
