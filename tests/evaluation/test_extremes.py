from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from clipmill.evaluation.extremes import Extremes


def grey(level: int, num: int = 1, side: int = 64, num_frames: int = 8) -> np.ndarray:
    return np.full((num, num_frames, side, side, 3), level, np.uint8)


def keys(clips: list[dict[str, object]]) -> list[object]:
    return [clip["key"] for clip in clips]


def test_the_worst_and_the_best_of_all_batches_are_kept():
    errors = np.random.default_rng(0).permutation(100) / 1000
    extremes = Extremes()
    for start in range(0, 100, 7):
        part = errors[start : start + 7]
        extremes.update([f"{error:.3f}" for error in part], grey(9, len(part)), grey(7, len(part)), part)
    result = extremes.result()
    assert keys(result["worst"]) == ["0.099", "0.098", "0.097", "0.096"]
    assert keys(result["best"]) == ["0.000", "0.001", "0.002", "0.003"]
    assert result["worst"][0]["psnr_db"] == pytest.approx(-10 * math.log10(0.099))
    assert result["best"][0]["psnr_db"] is None  # without error


@pytest.mark.parametrize(("num_clips", "shown"), [(1, 1), (2, 1), (5, 3), (7, 4)])
def test_of_few_clips_half_are_the_worst(num_clips: int, shown: int):
    extremes = Extremes()
    names = [f"{number}" for number in range(num_clips)]
    extremes.update(names, grey(0, num_clips), grey(1, num_clips), np.arange(num_clips) / 100)
    result = extremes.result()
    assert keys(result["worst"]) == names[::-1][:shown]
    assert keys(result["best"]) == names[:shown]
    assert extremes.picture().startswith(b"\x89PNG")


@pytest.mark.parametrize(("side", "num_frames", "num_shown"), [(16, 8, 8), (64, 16, 8), (128, 16, 4), (256, 3, 2)])
def test_the_picture_has_the_worst_left_and_real_above(side: int, num_frames: int, num_shown: int):
    extremes = Extremes()
    extremes.update(["good"], grey(60, 1, side, num_frames), grey(62, 1, side, num_frames), np.array([0.01]))
    extremes.update(["poor"], grey(120, 1, side, num_frames), grey(200, 1, side, num_frames), np.array([0.5]))
    with Image.open(io.BytesIO(extremes.picture())) as image:
        pixels = np.asarray(image.convert("RGB"))
    frame = 512 // num_shown + 2  # with the gap
    assert pixels.shape == (20 + 2 * frame + 8, 2 * 512 + 4 * num_shown + 24, 3)
    real, copy = pixels[20 + frame // 2], pixels[20 + frame + frame // 2]
    for left in range(0, num_shown * frame, frame):
        assert (real[left : left + frame - 2] == 120).all()
        assert (copy[left : left + frame - 2] == 200).all()
        right = left - num_shown * frame + len(real)
        assert (real[right : right + frame - 2] == 60).all()
        assert (copy[right : right + frame - 2] == 62).all()
    assert pixels[:20].min() < 100  # something is written above
