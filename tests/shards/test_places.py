from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clipmill.shards.places import shares, spread


@given(st.data())
def test_a_spread_takes_different_samples_evenly(data):
    num_samples = data.draw(st.integers(1, 300))
    num_taken = data.draw(st.integers(1, num_samples))
    taken = spread(np.arange(num_taken), num_taken, num_samples)
    assert taken[0] == 0
    assert taken[-1] < num_samples
    steps = np.diff(np.append(taken, num_samples))
    assert set(steps.tolist()) <= {num_samples // num_taken, -(-num_samples // num_taken)}


def test_a_spread_is_exact_where_the_product_would_not_fit():
    for num_samples, num_taken in ((10**9, 10**6), (10**9, 10**9), (5 * 10**9, 5 * 10**9), (10**15 + 7, 3 * 10**9)):
        index = np.array([0, 1, num_taken // 3, num_taken - 1])
        expected = [number * num_samples // num_taken for number in index.tolist()]
        assert spread(index, num_taken, num_samples).tolist() == expected


def test_each_row_may_be_of_another_data_set():
    index, num_taken, num_samples = np.array([0, 1, 0, 1, 2]), np.array([2, 2, 3, 3, 3]), np.array([9, 9, 3, 3, 3])
    assert spread(index, num_taken, num_samples).tolist() == [0, 4, 0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 500)), min_size=1, max_size=5), st.integers(0, 300))
def test_shares_add_up_to_what_is_wanted_or_there(parts, max_samples):
    sizes, slots = np.array(parts).T
    taken = shares(max_samples, sizes, slots)
    assert taken.sum() == min(max_samples, sizes.sum())
    assert (taken >= 0).all()
    assert (taken <= sizes).all()


def test_shares_go_by_weight_and_what_one_lacks_the_others_give():
    slots = np.array([700, 200, 100])
    assert shares(10, np.array([50, 50, 50]), slots).tolist() == [7, 2, 1]
    assert shares(10, np.array([0, 50, 50]), slots).tolist() == [0, 7, 3]
    assert shares(10, np.array([4, 50, 50]), slots).tolist() == [4, 4, 2]
    assert shares(10, np.array([4, 0, 3]), slots).tolist() == [4, 0, 3]
    assert shares(10, np.array([0, 0, 0]), slots).tolist() == [0, 0, 0]
