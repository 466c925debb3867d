from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipmill.evaluation.extremes import extremes_picture
from clipmill.evaluation.gallery import Gallery, pick_clips
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


def grey(level: int, side: int, num_frames: int) -> np.ndarray:
    return np.full((num_frames, side, side, 3), level, np.uint8)


@pytest.mark.parametrize(("side", "num_frames", "num_shown"), [(16, 8, 8), (64, 16, 8), (128, 16, 4), (256, 3, 2)])
def test_the_picture_has_the_worst_left_and_real_above(side: int, num_frames: int, num_shown: int):
    real, copies = (np.stack([grey(level, side, num_frames) for level in levels]) for levels in ((60, 120), (62, 200)))
    gallery = Gallery(real, copies, (None, None), ("good", "poor"))
    extremes: dict[str, Any] = {
        "worst": [{"key": "poor", "psnr_db": 3.0}],
        "best": [{"key": "good", "psnr_db": None}],  # without error
    }
    with Image.open(io.BytesIO(extremes_picture(extremes, gallery))) as image:
        pixels = np.asarray(image.convert("RGB"))
    frame = 512 // num_shown + 2  # with the gap
    assert pixels.shape == (20 + 2 * frame + 8, 2 * 512 + 4 * num_shown + 24, 3)
    original, copy = pixels[20 + frame // 2], pixels[20 + frame + frame // 2]
    for left in range(0, num_shown * frame, frame):
        assert (original[left : left + frame - 2] == 120).all()
        assert (copy[left : left + frame - 2] == 200).all()
        right = left - num_shown * frame + len(original)
        assert (original[right : right + frame - 2] == 60).all()
        assert (copy[right : right + frame - 2] == 62).all()
    assert pixels[:20].min() < 100  # something is written above


def test_the_gallery_shows_different_videos_first():
    keys = [f"{video:016x}_{clip:06d}" for video in range(5) for clip in range(4)]
    assert pick_clips(keys, [""] * 20, []) == [0, 1, 4, 5, 8, 9, 12, 16]
    labels = ["a", "a", "b", "b"] * 5
    picked = pick_clips(keys, labels, ["a", "b"])
    assert [labels[number] for number in picked].count("a") == 8
    assert {keys[number][:16] for number in picked} == {f"{video:016x}" for video in range(5)}
    assert pick_clips(keys, labels, ["a"]) == [0, 1, 4, 5, 8, 9, 12, 16]
