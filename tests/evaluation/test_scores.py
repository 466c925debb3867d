from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from clipmill.evaluation.scores import CodeUsage, ReconstructionScores, VideoStatistics, ssim_per_clip


def clips(seed: int, num_clips: int = 5, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_clips, 4, side, side, 3), dtype=np.uint8)


def test_reconstruction_scores_agree_with_numpy_in_any_batches():
    original, reconstruction = clips(0), clips(1)
    a, b = original / 255.0, reconstruction / 255.0
    whole, parts = ReconstructionScores(), ReconstructionScores()
    whole.update(original, reconstruction)
    parts.update(original[2:], reconstruction[2:])
    parts.update(original[:2], reconstruction[:2])

    result = whole.result()
    mse = np.mean((a - b) ** 2)
    assert result["mse"] == pytest.approx(mse, rel=1e-12)
    assert result["data_variance"] == pytest.approx(a.var(), rel=1e-12)
    assert result["nmse"] == pytest.approx(mse / a.var(), rel=1e-12)
    assert result["psnr_db"] == pytest.approx(10 * math.log10(1 / mse), rel=1e-12)
    assert result["num_clips"] == 5
    summed = parts.result()
    assert summed.pop("ssim") == pytest.approx(result.pop("ssim"), rel=1e-12)
    assert summed == result  # integer sums: not merely close


def test_predicting_the_mean_has_nmse_one_and_a_perfect_copy_zero():
    original = np.tile(np.array([100, 200], np.uint8), (3, 2, 12, 12 * 3 // 2)).reshape(3, 2, 12, 12, 3)
    scores = ReconstructionScores()
    scores.update(original, np.full_like(original, 150))
    assert scores.result()["nmse"] == pytest.approx(1.0)
    perfect = ReconstructionScores()
    perfect.update(original, original)
    assert perfect.result()["nmse"] == 0
    assert perfect.result()["psnr_db"] is None
    assert perfect.result()["ssim"] == pytest.approx(1.0)


def test_constant_data_has_no_nmse():
    scores = ReconstructionScores()
    scores.update(np.zeros((1, 2, 8, 8, 3), np.uint8), np.ones((1, 2, 8, 8, 3), np.uint8))
    result = scores.result()
    assert result["nmse"] is None
    assert result["ssim"] is None  # 8 pixels are less than the window


def test_ssim_is_the_formula_of_wang_with_reflected_borders():
    original, reconstruction = clips(2, 1, 12), clips(3, 1, 12)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blurred(picture: np.ndarray) -> np.ndarray:
        padded = np.pad(picture, ((5, 5), (5, 5), (0, 0)), mode="reflect")
        return np.einsum("hwcij,ij->hwc", np.lib.stride_tricks.sliding_window_view(padded, (11, 11), (0, 1)), window)

    expected = []
    for x, y in zip(original[0] / 255.0, reconstruction[0] / 255.0, strict=True):
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        covariance = blurred(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
        expected.append((luminance * structure).mean())
    measured = ssim_per_clip(original, reconstruction)
    assert measured is not None
    assert measured[0] == pytest.approx(np.mean(expected), abs=1e-5)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        ReconstructionScores().update(clips(0), clips(0)[:, :2])


def test_nothing_scored_is_an_error():
    for empty in (ReconstructionScores(), CodeUsage(4), VideoStatistics()):
        with pytest.raises(ValueError, match="no clip"):
            empty.result()


def test_code_usage_of_a_known_distribution():
    usage = CodeUsage(8)
    usage.update(np.array([0, 0, 1, 2]).reshape(1, 1, 2, 2))
    usage.update(np.array([0, 0, 1, 2]).reshape(1, 1, 2, 2))
    result = usage.result()
    assert result["num_used"] == 3
    assert result["used_share"] == 3 / 8
    assert result["entropy_bits"] == pytest.approx(1.5)
    assert result["perplexity"] == pytest.approx(2**1.5)
    assert result["tokens_per_clip"] == 4
    assert result["bits_per_clip"] == pytest.approx(6.0)
    assert result["raw_bits_per_clip"] == pytest.approx(12.0)


def test_code_usage_of_several_codebooks():
    usage = CodeUsage(4, num_codebooks=2)
    first, second = np.array([0, 0, 1, 2]), np.array([3, 3, 3, 3])
    usage.update(np.stack([first, second], axis=-1).reshape(1, 1, 2, 2, 2))
    result = usage.result()
    assert (result["num_used"], result["used_share"]) == (4, 4 / 8)
    assert result["entropy_bits"] == pytest.approx((1.5 + 0) / 2)
    assert result["perplexity"] == pytest.approx((2**1.5 + 1) / 2)  # the mean, not that of the mean entropy
    assert result["tokens_per_clip"] == 8
    assert result["bits_per_clip"] == pytest.approx(4 * 1.5)
    assert result["raw_bits_per_clip"] == pytest.approx(8 * 2)
    assert result["sorted_counts"] == [4, 2, 1, 1, 0, 0, 0, 0]


def test_the_error_of_each_clip_and_its_psnr():
    original, reconstruction = clips(6), clips(7)
    scores = ReconstructionScores()
    per_clip = scores.update(original, reconstruction, lpips=np.arange(5.0))
    expected = np.square(original / 255 - reconstruction / 255).mean(axis=(1, 2, 3, 4))
    assert per_clip == pytest.approx(expected, rel=1e-12)
    assert scores.result()["lpips"] == 2
    values = [torch.from_numpy(video / 255) for video in (reconstruction, original)]
    measured = peak_signal_noise_ratio(*values, data_range=1.0).item()
    assert scores.result()["psnr_db"] == pytest.approx(measured, rel=1e-5)


def test_video_statistics_agree_with_numpy_in_any_batches():
    video = clips(4)
    values = video / 255.0
    statistics = VideoStatistics()
    statistics.update(video[:3])
    statistics.update(video[3:])
    result = statistics.result()
    assert result["pixel_mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert result["pixel_variance"] == pytest.approx(values.var(), rel=1e-12)
    assert result["frame_change"] == pytest.approx(np.abs(np.diff(values, axis=1)).mean(), rel=1e-12)
    assert result["frame_change_energy"] == pytest.approx((np.diff(values, axis=1) ** 2).mean(), rel=1e-12)


def test_a_clip_of_one_frame_does_not_move():
    statistics = VideoStatistics()
    statistics.update(clips(5)[:, :1])
    assert statistics.result()["frame_change"] == 0
