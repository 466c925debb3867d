from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.errors import UserError
from clipmill.shards.mixture import NUM_SLOTS, MixtureOrder, apportion, node_streams, streams_of_datasets
from clipmill.shards.order import num_streams, rank_rows
from tests.shards import order_reference

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 16)


@st.composite
def mixes(draw):
    """Counts, slots, seed, global batch and window of a mixture."""
    num_parts = draw(st.integers(1, 5))
    counts = [draw(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)) for _ in range(num_parts)]
    weights = draw(st.lists(st.floats(0.01, 100), min_size=num_parts, max_size=num_parts))
    slots = apportion(NUM_SLOTS - num_parts, weights) + 1
    return counts, slots, draw(st.integers(0, 2**70)), draw(st.integers(1, 60)), draw(st.integers(1, 50))


def build(mixture):
    counts, *others = mixture
    return MixtureOrder([np.array(part) for part in counts], *others)


@given(total=st.integers(0, 10_000), weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(any))
def test_apportioned_parts_are_the_whole_and_within_one_of_their_shares(total, weights):
    parts = apportion(total, weights)
    assert parts.sum() == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-6


@given(mixture=mixes(), first=st.integers(0, 2**40))
def test_any_thousand_positions_hold_the_exact_shares(mixture, first):
    part, _ = build(mixture).count(np.arange(first, first + NUM_SLOTS))
    assert np.bincount(part, minlength=len(mixture[1])).tolist() == mixture[1].tolist()


@given(mixture=mixes(), first=st.integers(0, 10**6), length=st.integers(1, NUM_SLOTS))
def test_any_stretch_holds_nearly_its_shares(mixture, first, length):
    slots = mixture[1]
    part, _ = build(mixture).count(np.arange(first, first + length))
    assert np.all(np.abs(np.bincount(part, minlength=len(slots)) - length * slots / NUM_SLOTS) <= len(slots))


@settings(max_examples=30)
@given(mixture=mixes(), data=st.data())
def test_each_sample_comes_once_in_each_epoch_of_its_data_set(mixture, data):
    counts, slots, *_ = mixture
    mixed = build(mixture)
    part = data.draw(st.integers(0, len(slots) - 1))
    num_samples, first_shard = sum(counts[part]), sum(map(len, counts[:part]))
    epoch = data.draw(st.integers(0, 3))
    blocks = np.array([epoch * num_samples, (epoch + 1) * num_samples + slots[part]]) // slots[part]
    positions = np.arange(blocks[0] * NUM_SLOTS, blocks[1] * NUM_SLOTS)
    parts, counters = mixed.count(positions)
    wanted = (parts == part) & (counters // num_samples == epoch)
    shards, rows = mixed.locate(positions[wanted])
    ids = np.cumsum([0, *counts[part]])[shards - first_shard] + rows
    assert sorted(ids) == list(range(num_samples))
    assert np.all(np.diff(counters[parts == part]) == 1)


@given(mixture=mixes(), step=st.integers(0, 1000))
def test_every_world_size_gets_the_same_batch_sorted_by_data_set_epoch_and_stream(mixture, step):
    counts, slots, _, global_batch, _ = mixture
    mixed = build(mixture)
    positions = mixed.batch_positions(step, global_batch)
    assert sorted(positions) == list(range(step * global_batch, (step + 1) * global_batch))
    part, counter = mixed.count(positions)
    sizes, streams = np.array([sum(each) for each in counts])[part], np.array(streams_of_datasets(global_batch, slots))
    epoch, index = np.divmod(counter, sizes)
    keys = list(zip(part, epoch, index % streams[part], positions, strict=True))
    assert keys == sorted(keys)
    for world_size in WORLD_SIZES:
        ranks = [rank_rows(positions, rank, world_size) for rank in range(world_size)]
        assert np.concatenate([mine[weight == 1] for mine, weight in ranks]).tolist() == positions.tolist()


@given(mixture=mixes(), first=st.integers(0, 50))
def test_resuming_is_a_suffix(mixture, first):
    global_batch = mixture[3]
    undisturbed, resumed = build(mixture), pickle.loads(pickle.dumps(build(mixture)))
    sequence = [undisturbed.locate(undisturbed.batch_positions(step, global_batch)) for step in range(first + 3)]
    for step in range(first, first + 3):
        here = resumed.locate(resumed.batch_positions(step, global_batch))
        np.testing.assert_array_equal(np.stack(here), np.stack(sequence[step]))


@given(mixture=mixes(), position=st.integers(0, 2**40))
def test_the_vectorised_mix_is_the_documented_one(mixture, position):
    counts, slots, seed, global_batch, window = mixture
    shards, rows = build(mixture).locate(np.array([position]))
    streams = streams_of_datasets(global_batch, slots)
    reference = order_reference.locate_mixed(position, counts, slots.tolist(), seed, streams, window)
    assert (shards[0], rows[0]) == reference


def test_the_mix_does_not_change_between_versions():
    """Declare a change of these numbers in the CHANGELOG: every run under way would see samples twice or never."""
    order = MixtureOrder([np.array([30, 20]), np.array([7])], np.array([700, 300]), seed=1, global_batch=8, window=16)
    shards, rows = order.locate(np.arange(20))
    assert shards.tolist() == [1, 2, 1, 0, 2, 0, 0, 1, 2, 1, 0, 2, 0, 0, 2, 1, 1, 0, 2, 0]
    assert rows.tolist() == [9, 2, 14, 5, 5, 10, 21, 7, 1, 15, 1, 4, 11, 23, 3, 5, 13, 0, 6, 16]


def test_a_data_set_alone_has_the_streams_it_always_has():
    for global_batch in (1, 7, 32, 96, 134, 1024):
        assert streams_of_datasets(global_batch, np.array([NUM_SLOTS])) == [num_streams(global_batch)]
    assert streams_of_datasets(128, np.array([500, 250, 250])) == [64, 32, 32]
    assert streams_of_datasets(134, np.array([990, 9, 1])) == [64, 1, 1]


def test_an_empty_data_set_in_a_mix_is_refused():
    with pytest.raises(UserError, match="holds no samples"):
        MixtureOrder([np.array([3]), np.array([0])], np.array([500, 500]), 0, 8, 16)


@pytest.mark.parametrize(
    ("slots", "ranks", "world_size", "expected"),
    [
        ([1000], 8, 8, [64]),
        ([1000], 8, 64, [8]),
        ([1000], 1, 3, [22]),
        ([500, 500], 8, 8, [64, 64]),
        ([500, 500], 8, 32, [33, 33]),
        ([250, 750], 4, 16, [48, 18]),
    ],
)
def test_the_streams_of_a_node_cover_what_its_ranks_read(slots, ranks, world_size, expected):
    global_batch = 384
    slots = np.array(slots)
    nodes = node_streams(global_batch, slots, ranks, world_size)
    assert nodes.shape == (-(-world_size // ranks), len(slots))
    assert nodes.max(axis=0).tolist() == expected
    streams = np.array(streams_of_datasets(global_batch, slots))
    order = MixtureOrder([np.array([10**6])] * len(slots), slots, 0, global_batch, 16)
    for step in range(3):
        positions = order.batch_positions(step, global_batch)
        for node, most in enumerate(nodes):
            members = range(node * ranks, min((node + 1) * ranks, world_size))
            rows = np.concatenate([rank_rows(positions, rank, world_size)[0] for rank in members])
            part, counter = order.count(rows)
            for number in range(len(slots)):
                read = np.unique(counter[part == number] % streams[number])
                assert len(read) <= most[number]


@pytest.mark.parametrize(("slots", "most"), [([500, 500], 1.1), ([750, 250], 1.1), ([700, 300], 1.4)])
def test_ranks_read_few_shards_of_a_mix(slots, most):
    """Hardly more than one each where every share of the batch is a whole number of streams, a few more elsewhere."""
    global_batch, world_size = 512, 8
    counts = [np.full(share, 64) for share in slots]  # data sets that last equally long
    order = MixtureOrder(counts, np.array(slots), 0, global_batch, 512)
    seen = np.zeros((sum(slots), world_size), bool)
    for step in range(64 * sum(slots) // global_batch):
        shards, _ = order.locate(order.batch_positions(step, global_batch))
        seen[shards, np.arange(global_batch) // (global_batch // world_size)] = True
    assert seen.sum(axis=1).mean() < most


def test_data_sets_of_one_size_are_read_in_different_orders():
    order = MixtureOrder([np.full(10, 50)] * 2, np.array([500, 500]), 0, 8, 64)
    part, _ = order.count(np.arange(1000))
    shards, rows = order.locate(np.arange(1000))
    orders = [(shards[part == number] % 10) * 50 + rows[part == number] for number in (0, 1)]
    assert (orders[0] == orders[1]).mean() < 0.05
