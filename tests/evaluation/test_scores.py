from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torchmetrics.functional.image import peak_signal_noise_ratio

from clipmill.evaluation.scores import (
    code_numbers,
    count_codes,
    detail_energies,
    reconstruction_numbers,
    squared_errors,
    ssim_per_clip,
)


def clips(seed: int, num_clips: int = 5, side: int = 16) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (num_clips, 4, side, side, 3), dtype=np.uint8)
    return torch.from_numpy(values)


def scores(original: torch.Tensor, reconstruction: torch.Tensor) -> dict[str, Any]:
    found = {
        "squared_error": squared_errors(original, reconstruction),
        "detail": detail_energies(reconstruction),
        "detail_of_original": detail_energies(original),
        "ssim": ssim_per_clip(original, reconstruction),
        "lpips": np.full(len(original), np.nan),
    }
    sizes = np.tile(np.array(original.shape[1:4]), (len(original), 1))
    return reconstruction_numbers(found, sizes, (original.numpy() / 255).var())


def test_reconstruction_scores_agree_with_numpy_and_torchmetrics():
    original, reconstruction = clips(0), clips(1)
    a, b = original.numpy() / 255, reconstruction.numpy() / 255
    result = scores(original, reconstruction)
    mse = np.mean((a - b) ** 2)
    assert result["mse"] == pytest.approx(mse, rel=1e-12)
    assert result["nmse"] == pytest.approx(mse / a.var(), rel=1e-12)
    measured = peak_signal_noise_ratio(torch.from_numpy(b), torch.from_numpy(a), data_range=1.0).item()
    assert result["psnr_db"] == pytest.approx(measured, rel=1e-5)
    assert (result["num_clips"], result["lpips"]) == (5, None)


def test_each_clip_has_a_psnr_and_an_ssim_of_its_own():
    original, reconstruction = clips(0), clips(1)
    reconstruction[0] = original[0]
    reconstruction[1] //= 2
    errors = np.square(original.numpy() / 255 - reconstruction.numpy() / 255).mean(axis=(1, 2, 3, 4))
    psnr = -10 * np.log10(errors[1:])  # the first has none: it has no error
    found = scores(original, reconstruction)["per_clip"]
    assert found["psnr_db"]["mean"] == pytest.approx(psnr.mean(), rel=1e-12)
    assert found["psnr_db"]["deviation"] == pytest.approx(psnr.std(), rel=1e-12)
    assert found["psnr_db"]["median"] == pytest.approx(np.median(psnr), rel=1e-12)
    assert found["psnr_db"]["percentile_5"] == pytest.approx(np.percentile(psnr, 5), rel=1e-12)
    assert found["ssim"]["mean"] == pytest.approx(ssim_per_clip(original, reconstruction).mean(), rel=1e-12)


def test_batches_do_not_matter():
    original, reconstruction = clips(0), clips(1)
    for measure in (squared_errors, ssim_per_clip):
        whole = measure(original, reconstruction)
        parts = [measure(original[part], reconstruction[part]) for part in (slice(0, 2), slice(2, 5))]
        assert np.array_equal(whole, np.concatenate(parts))


def test_predicting_the_mean_has_nmse_one_and_a_perfect_copy_zero():
    original = torch.tensor([100, 200], dtype=torch.uint8).repeat(3, 2, 12, 12 * 3 // 2).reshape(3, 2, 12, 12, 3)
    assert scores(original, torch.full_like(original, 150))["nmse"] == pytest.approx(1.0)
    perfect = scores(original, original)
    assert perfect["nmse"] == 0
    assert perfect["psnr_db"] is None
    assert perfect["per_clip"]["psnr_db"] is None
    assert perfect["ssim"] == pytest.approx(1.0)


def test_blur_loses_energy_of_high_frequencies():
    original = clips(4, 2, 16)
    blurred = original.clone()
    blurred[:, :, :, :-1] = (original[:, :, :, :-1].int() + original[:, :, :, 1:]) // 2
    copies = {"same": original, "blurred": blurred, "flat": torch.full_like(original, 90)}
    found = {name: scores(original, copy)["high_frequency_energy"] for name, copy in copies.items()}
    kernel = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    energies = [
        sum(
            (convolve2d(frame[..., colour].double().numpy(), kernel, mode="valid") ** 2).sum()
            for clip in video
            for frame in clip
            for colour in range(3)
        )
        for video in (blurred, original)
    ]
    assert (found["same"], found["flat"]) == (1.0, 0.0)
    assert found["blurred"] == pytest.approx(energies[0] / energies[1], rel=1e-12)
    assert found["blurred"] < 0.7


def test_constant_data_has_no_nmse():
    result = scores(torch.zeros((1, 2, 8, 8, 3), dtype=torch.uint8), torch.ones((1, 2, 8, 8, 3), dtype=torch.uint8))
    assert result["nmse"] is None
    assert result["ssim"] is None  # 8 pixels are less than the window
    assert result["per_clip"]["ssim"] is None


def test_ssim_is_the_formula_of_wang_with_reflected_borders():
    original, reconstruction = clips(2, 1, 12), clips(3, 1, 12)
    numpy_clips = zip(original[0].numpy() / 255, reconstruction[0].numpy() / 255, strict=True)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blurred(picture: np.ndarray) -> np.ndarray:
        padded = np.pad(picture, ((5, 5), (5, 5), (0, 0)), mode="reflect")
        return np.einsum("hwcij,ij->hwc", np.lib.stride_tricks.sliding_window_view(padded, (11, 11), (0, 1)), window)

    expected = []
    for x, y in numpy_clips:
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        covariance = blurred(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
        expected.append((luminance * structure).mean())
    measured = ssim_per_clip(original, reconstruction)
    assert measured[0] == pytest.approx(np.mean(expected), abs=1e-5)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        squared_errors(clips(0), clips(0)[:, :2])


def test_code_usage_of_a_known_distribution():
    clip = np.array([0, 0, 1, 2]).reshape(1, 1, 2, 2)
    result = code_numbers(count_codes(clip, 8, 1) + count_codes(clip, 8, 1), 2)
    assert result["num_used"] == 3
    assert result["used_share"] == 3 / 8
    assert result["entropy_bits"] == pytest.approx(1.5)
    assert result["perplexity"] == pytest.approx(2**1.5)
    assert result["tokens_per_clip"] == 4
    assert result["bits_per_clip"] == pytest.approx(6.0)
    assert result["raw_bits_per_clip"] == pytest.approx(12.0)


def test_code_usage_of_several_codebooks():
    first, second = np.array([0, 0, 1, 2]), np.array([3, 3, 3, 3])
    result = code_numbers(count_codes(np.stack([first, second], axis=-1).reshape(1, 1, 2, 2, 2), 4, 2), 1)
    assert (result["num_used"], result["used_share"]) == (4, 4 / 8)
    assert result["entropy_bits"] == pytest.approx((1.5 + 0) / 2)
    assert result["perplexity"] == pytest.approx((2**1.5 + 1) / 2)  # the mean, not that of the mean entropy
    assert result["tokens_per_clip"] == 8
    assert result["bits_per_clip"] == pytest.approx(4 * 1.5)
    assert result["raw_bits_per_clip"] == pytest.approx(8 * 2)
    assert result["sorted_counts"] == [4, 2, 1, 1, 0, 0, 0, 0]
