from __future__ import annotations

import math

import numpy as np
import pytest

from clipmill.evaluation.gallery import pick_clips
from clipmill.evaluation.parts import Arrays
from clipmill.evaluation.reconstruction import extreme_clips

SIZES = (4, 8, 8)


def found(errors: np.ndarray) -> tuple[Arrays, Arrays]:
    """Arrays of clips with these mean square errors, in units of [0, 1]."""
    squared = (errors * math.prod(SIZES) * 3 * 255**2).round().astype(np.int64)
    return {"sizes": np.tile(np.array(SIZES), (len(errors), 1))}, {"squared_error": squared}


def test_the_worst_and_the_best_of_all_clips_are_found():
    errors = np.random.default_rng(0).permutation(100) / 1000
    worst, best = extreme_clips(*found(errors))
    assert errors[worst].tolist() == [0.099, 0.098, 0.097, 0.096]
    assert errors[best].tolist() == [0.000, 0.001, 0.002, 0.003]


@pytest.mark.parametrize(("num_clips", "shown"), [(1, 1), (2, 1), (5, 3), (7, 4)])
def test_of_few_clips_half_are_the_worst(num_clips: int, shown: int):
    worst, best = extreme_clips(*found(np.arange(num_clips) / 100))
    assert worst == list(range(num_clips))[::-1][:shown]
    assert best == list(range(num_clips))[:shown]


def test_the_gallery_shows_different_videos_first():
    keys = [f"{video:016x}_{clip:06d}" for video in range(5) for clip in range(4)]
    assert pick_clips(keys, [""] * 20, []) == list(range(20))
    labels = ["a", "a", "b", "b"] * 5
    picked = pick_clips(keys, labels, ["a", "b"])
    assert [labels[number] for number in picked].count("a") == 8
    assert {keys[number][:16] for number in picked} == {f"{video:016x}" for video in range(5)}
    assert pick_clips(keys, labels, ["a"]) == [0, 1, 4, 5, 8, 9, 12, 16]
