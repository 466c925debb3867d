from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipmill.sampling.filters import Filters, draw
from clipmill.sampling.noise import Noise

INF = math.inf


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (Filters(), {0, 1, 2, 3}),
        (Filters(top_k=2), {1, 3}),
        (Filters(top_k=9), {0, 1, 2, 3}),
        (Filters(top_p=0.5), {1, 3}),
        (Filters(top_p=0.01), {3}),
        (Filters(top_p=1e-15), {3}),
        (Filters(top_k=2, top_p=0.5), {3}),  # 0.4 of the 0.7 that top-k leaves is enough
        (Filters(min_p=0.6), {1, 3}),
        (Filters(min_p=1.0), {3}),
    ],
)
def test_filters_keep_the_most_likely(filters: Filters, kept: set[int]) -> None:
    logits = torch.tensor([0.2, 0.3, 0.1, 0.4]).log()
    after = filters.keep(logits)
    assert set(after.isfinite().nonzero().flatten().tolist()) == kept
    assert torch.equal(after[list(kept)], logits[list(kept)])


def test_ties_with_the_last_kept_code_stay() -> None:
    logits = torch.tensor([1.0, 0.0, 0.0, -1.0])
    for filters in (Filters(top_k=2), Filters(top_p=0.7)):
        assert filters.keep(logits).tolist() == [1.0, 0.0, 0.0, -INF]


@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any),
    top_p=st.floats(1e-6, 1, exclude_max=True),
    seed=st.integers(0, 2**64 - 1),
)
def test_what_top_p_keeps_is_the_least_that_is_enough(weights: list[int], top_p: float, seed: int) -> None:
    logits = torch.tensor(weights).log()
    probabilities = np.array(weights) / sum(weights)
    kept = Filters(top_p=top_p).keep(logits).isfinite().numpy()
    assert probabilities[kept].sum() >= top_p - 1e-6
    smallest = probabilities[kept].min()
    assert (probabilities[~kept] < smallest).all()
    assert probabilities[probabilities > smallest].sum() < top_p + 1e-6
    noise = Noise(seed, [0], len(weights), torch.device("cpu")).at(0, 1)[0, 0]
    assert kept[draw(logits, noise, Filters(top_p=top_p)).item()]


def test_a_schedule_of_temperatures_goes_by_the_frame_of_the_whole_video() -> None:
    assert Filters(0.5).temperatures(7, 3) == [0.5, 0.5, 0.5]
    assert Filters((1.0, 0.9, 0.8)).temperatures(0, 2) == [1.0, 0.9]
    assert Filters((1.0, 0.9, 0.8)).temperatures(1, 4) == [0.9, 0.8, 0.8, 0.8]
