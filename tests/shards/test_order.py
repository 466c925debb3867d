from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.errors import UserError
from clipmill.shards.order import (
    Order,
    num_streams,
    rank_rows,
    same_video_pairs,
)
from tests.shards import order_reference

counts_lists = st.lists(st.integers(0, 400), min_size=1, max_size=90).filter(any)
settings_of_an_order = {
    "counts": counts_lists,
    "seed": st.integers(0, 2**70),
    "streams": st.integers(1, 64),
    "window": st.integers(1, 200),
}


def sample_ids(counts, shards, rows):
    """Numbers of samples in stored order."""
    return np.cumsum([0, *counts])[shards] + rows


def epoch_ids(order, counts, epoch):
    positions = np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    return sample_ids(counts, *order.locate(positions))


@given(epoch=st.integers(0, 2**30), **settings_of_an_order)
def test_each_sample_comes_exactly_once_an_epoch(counts, seed, streams, window, epoch):
    order = Order(np.array(counts), seed, streams, window)
    shards, rows = order.locate(np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples))
    assert shards.dtype == rows.dtype == np.int64
    assert np.all(rows >= 0)
    assert np.all(rows < np.array(counts)[shards])
    assert sorted(sample_ids(counts, shards, rows)) == list(range(order.num_samples))


@given(data=st.data(), **settings_of_an_order)
def test_a_position_does_not_depend_on_the_call_that_asks_for_it(counts, seed, streams, window, data):
    order = Order(np.array(counts), seed, streams, window)
    asked = data.draw(st.lists(st.integers(0, 8 * order.num_samples), min_size=1, max_size=30))
    shards, rows = order.locate(np.array(asked))
    for position, shard, row in zip(asked, shards, rows, strict=True):
        alone = Order(np.array(counts), seed, streams, window).locate(np.array([position]))
        assert (alone[0][0], alone[1][0]) == (shard, row)


@given(global_batch=st.integers(1, 60), step=st.integers(0, 1000), **settings_of_an_order)
def test_every_world_size_gets_the_same_batch(counts, seed, streams, window, global_batch, step):
    order = Order(np.array(counts), seed, streams, window)
    positions = order.batch_positions(step, global_batch)
    assert sorted(positions) == list(range(step * global_batch, (step + 1) * global_batch))
    for world_size in (1, 2, 3, 4, 6, 8, 16):
        served = []
        for rank in range(world_size):
            mine, weight = rank_rows(positions, rank, world_size)
            assert len(mine) == len(weight) == -(-global_batch // world_size)
            assert weight.dtype == np.float32
            served += list(mine[weight == 1])
            assert np.isin(mine, positions).all()
        assert served == list(positions)


@given(first=st.integers(0, 9), global_batch=st.integers(1, 20), **settings_of_an_order)
def test_resuming_is_a_suffix(counts, seed, streams, window, first, global_batch):
    counts = np.array(counts)
    undisturbed = Order(counts, seed, streams, window)
    resumed = pickle.loads(pickle.dumps(Order(counts, seed, streams, window)))
    sequence = []
    for step in range(first + 3):
        positions = undisturbed.batch_positions(step, global_batch)
        sequence.append(np.stack(undisturbed.locate(positions)))
    for step in range(first, first + 3):
        positions = resumed.batch_positions(step, global_batch)
        np.testing.assert_array_equal(np.stack(resumed.locate(positions)), sequence[step])


def test_batches_are_sorted_by_epoch_and_stream():
    positions = Order(np.array([101]), 0, 8, 4).batch_positions(3, 32)
    sorting = [(p // 101, p % 101 % 8, p) for p in positions]
    assert sorting == sorted(sorting)
    assert positions.min() < 101 <= positions.max()


@given(position=st.integers(0, 2**40), **settings_of_an_order)
def test_the_vectorised_order_is_the_documented_one(counts, seed, streams, window, position):
    shards, rows = Order(np.array(counts), seed, streams, window).locate(np.array([position]))
    assert (shards[0], rows[0]) == order_reference.locate(position, counts, seed, streams, window)


def test_splitmix64_is_the_published_one():
    assert [order_reference.splitmix64(1234567, n) for n in range(2)] == [6457827717110365317, 3203168211198807973]


def test_streams_are_cuts_and_windows_stay_inside_them():
    counts, streams, window = [30, 0, 25, 40, 8], 4, 6
    order = Order(np.array(counts), 5, streams, window)
    for epoch in (0, 1):
        ids = epoch_ids(order, counts, epoch)
        # With one stream and windows of one, an epoch is the concatenation of the shards in their order.
        concatenated = epoch_ids(Order(np.array(counts), 5, 1, 1), counts, epoch)
        shard_of = np.repeat(np.arange(5), counts)[concatenated]
        runs = np.split(concatenated, np.flatnonzero(np.diff(shard_of)) + 1)
        assert len(runs) == 4
        assert all(np.all(np.diff(run) == 1) for run in runs)
        start = 0
        for stream in range(streams):
            served = list(ids[stream::streams])
            cut = list(concatenated[start : start + len(served)])
            start += len(served)
            begin, end = 0, window - stream * window // streams
            while begin < len(served):
                assert sorted(served[begin:end]) == sorted(cut[begin:end])
                begin, end = end, end + window
        assert start == order.num_samples


def test_the_order_does_not_change_between_versions():
    """Declare a change of these numbers in the CHANGELOG: every run under way would see samples twice or never."""
    order = Order(np.array([3, 0, 5, 4]), seed=1, num_streams=2, window=4)
    shards, rows = order.locate(np.arange(24))
    assert shards.tolist() == [3, 0, 3, 2, 3, 2, 3, 2, 0, 2, 0, 2, 3, 0, 3, 2, 3, 2, 3, 2, 0, 2, 0, 2]
    assert rows.tolist() == [3, 2, 2, 0, 0, 4, 1, 3, 1, 2, 0, 1, 2, 2, 3, 0, 1, 3, 0, 4, 1, 1, 0, 2]
    big = Order(np.full(1000, 997), seed=2, num_streams=64, window=4096)
    shards, rows = big.locate(np.array([0, 1, 12345678, 10**15]))
    assert shards.tolist() == [466, 237, 231, 71]
    assert rows.tolist() == [183, 717, 52, 160]


def test_epochs_and_seeds_differ():
    counts = [50] * 10
    orders = [epoch_ids(Order(np.array(counts), seed, 8, 64), counts, epoch) for seed in range(3) for epoch in range(3)]
    for one in range(9):
        for other in range(one):
            assert (orders[one] == orders[other]).mean() < 0.05


def test_first_windows_differ_by_stream():
    """At most one stream leaves its first window at a time, while there are as many lengths as streams."""
    window, streams = 64, 16
    firsts = {window - stream * window // streams for stream in range(streams)}
    assert len(firsts) == streams
    assert min(firsts) >= 1
    assert max(firsts) == window


@pytest.mark.parametrize("num_shards", [2, 3, 5, 7])
def test_every_order_of_a_few_shards_is_equally_likely(num_shards):
    """Chi-squared over the places of two shards, with one shard order an epoch; the seed is fixed, so is the result."""
    num_epochs = 4000
    order = Order(np.ones(num_shards, np.int64), 11, 1, 1)
    served = order.locate(np.arange(num_epochs * num_shards))[0].reshape(num_epochs, num_shards)
    pairs = np.bincount(served[:, 0] * num_shards + served[:, 1], minlength=num_shards**2)
    pairs = pairs.reshape(num_shards, num_shards)[~np.eye(num_shards, dtype=bool)]
    expected = num_epochs / len(pairs)
    freedom = len(pairs) - 1
    assert np.sum((pairs - expected) ** 2) / expected < freedom + 4 * np.sqrt(2 * freedom)


def test_served_order_does_not_follow_stored_order():
    counts = np.full(400, 100)
    order = Order(counts, 0, 32, 512)
    served = epoch_ids(order, counts, 0)
    correlation = np.corrcoef(np.arange(len(served)), served)[0, 1]
    assert abs(correlation) < 3 / np.sqrt(len(counts))
    # Within a window the places of samples are mixed too: neighbours of a stream are far apart.
    assert np.median(np.abs(np.diff(served[::32]))) > 50


def test_ranks_read_few_shards_when_p_divides_g_and_w_divides_p():
    counts, world_size, global_batch = np.full(200, 64), 8, 64
    order = Order(counts, 0, 64, 64)
    readers = [set() for _ in counts]
    for step in range(order.num_samples // global_batch):
        positions = order.batch_positions(step, global_batch)
        for rank in range(world_size):
            for shard in order.locate(rank_rows(positions, rank, world_size)[0])[0]:
                readers[shard].add(rank)
    assert np.mean([len(ranks) for ranks in readers]) < 1.1


@pytest.mark.parametrize(
    ("global_batch", "streams"), [(1, 1), (7, 7), (32, 32), (96, 48), (128, 64), (134, 2), (67, 1)]
)
def test_streams_are_the_largest_divisor_up_to_64(global_batch, streams):
    assert num_streams(global_batch) == streams


def test_a_data_set_without_samples_is_refused():
    for counts in ([], [0, 0]):
        with pytest.raises(UserError, match="holds no samples"):
            Order(np.array(counts, np.int64), 0, 1, 1)


def test_a_billion_samples_cost_nothing_to_order():
    counts = np.random.default_rng(0).integers(5000, 15000, 100_000)
    began = time.perf_counter()
    order = Order(counts, 3, 64, 4096)
    assert time.perf_counter() - began < 1
    order.locate(np.array([0]))  # the first position of an epoch orders its shards
    seconds = []
    for step in (0, 1000, 200_000):
        positions = order.batch_positions(step, 4096)
        began = time.perf_counter()
        order.locate(positions)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.010
    assert len(pickle.dumps(order)) < 8 * len(counts) + 16 * len(counts) * 5


@pytest.mark.parametrize(("clips_per_video", "global_batch"), [(10, 512), (40, 256), (10, 64)])
def test_same_video_pairs_are_as_many_as_the_formula_says(clips_per_video, global_batch):
    streams, window, steps = num_streams(global_batch), 512, 200
    counts = np.full(400, 500)
    order = Order(counts, 4, streams, window)
    pairs = 0
    after_first_windows = window * streams // global_batch  # those are shorter, and so have more such pairs
    for step in range(after_first_windows, after_first_windows + steps):
        positions = order.batch_positions(step, global_batch)
        videos = sample_ids(counts, *order.locate(positions)) // clips_per_video
        times = np.unique(videos, return_counts=True)[1]
        pairs += int(np.sum(times * (times - 1) // 2))
    expected = same_video_pairs(global_batch, streams, window, clips_per_video)
    # Windows cut one video in w / c, of which some pairs never meet: a few per cent. Two streams share the video that
    # the cut between them goes through: a pair now and then.
    assert abs(pairs / steps - expected) < 4 * np.sqrt(expected / steps) + 0.08 * expected + 0.1


def test_the_defaults_seldom_put_a_video_twice_into_a_batch():
    for global_batch in (32, 64, 256, 512):
        pairs = same_video_pairs(global_batch, num_streams(global_batch), 4096, clips_per_video=10)
        assert pairs < 0.01 * global_batch


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [8, 16, 64])
def test_an_epoch_of_2000_shards_is_read_by_hardly_more_than_one_rank_each(world_size):
    """By streams alone: which ranks read a shard is which streams overlap it, and a rank keeps to its own."""
    readers = ranks_per_shard(np.full(2000, 512), world_size, global_batch=512)
    assert readers.min() >= 1
    assert readers.mean() < 1.1


def ranks_per_shard(counts, world_size, global_batch):
    """Ranks that read each shard in the first epoch."""
    streams = num_streams(global_batch)
    order = Order(counts, 0, streams, 4096)
    seen = np.zeros((len(counts), world_size), bool)
    for step in range(order.num_samples // global_batch):
        positions = order.batch_positions(step, global_batch)
        shards = order.locate(positions)[0]
        seen[shards, np.arange(global_batch) // -(-global_batch // world_size)] = True
    return seen.sum(axis=1)
