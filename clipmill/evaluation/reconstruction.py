"""Measures real clips and their reconstructions batch by batch, and summarises the results.

It only needs clips and a tokenizer, so it can run right after ``train-vqvae``. docs/evaluation.md defines the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clipmill.evaluation.appearance import appearance_numbers, appearance_of
from clipmill.evaluation.distances import FeatureStatistics, frechet_distance
from clipmill.evaluation.networks import Networks
from clipmill.evaluation.parts import Arrays
from clipmill.evaluation.scores import (
    clip_psnr_db,
    code_numbers,
    count_codes,
    detail_energies,
    reconstruction_numbers,
    squared_errors,
    ssim_per_clip,
)
from clipmill.models.vqvae import VQVAE, to_input, to_pixels
from clipmill.shards.manifest import Manifest

__all__ = ["copies_of", "extreme_clips", "real_arrays", "reconstruction_sections", "tokenizer_arrays"]

MOST_EXTREMES = 4
"""Number of worst clips, and of best clips, to name and show."""


def copies_of(tokenizer: VQVAE, real: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes and reconstructs clips, as the uint8 pixels that viewers see.

    Args:
        tokenizer: in eval mode.
        real: uint8 [B, T, H, W, 3], on its device.

    Returns:
        Codes int64 [B, t, h, w] or [B, t, h, w, M], and reconstructions uint8 [B, T, H, W, 3].
    """
    codes = tokenizer.encode(to_input(real))
    return codes, to_pixels(tokenizer.decode(codes))


def real_arrays(batch: dict[str, Any], real: Tensor, networks: Networks) -> Arrays:
    """Measures a batch of real clips, independently of the tokenizer; one row per clip."""
    rows = {
        **appearance_of(real),
        "key": np.array(batch["key"], np.str_),
        "label": np.array([label or "" for label in batch["label"]], np.str_),  # no class has an empty name
        "fps": np.array([meta.get("fps", np.nan) for meta in batch["meta"]], np.float64),
    }
    return rows if networks.i3d is None else {**rows, "features": networks.i3d.features(batch["video"])}


def tokenizer_arrays(real: Tensor, tokenizer: VQVAE, networks: Networks) -> tuple[Arrays, Arrays]:
    """Measures a batch of real clips and their reconstructions.

    Returns:
        Arrays with one row per clip, and arrays to sum over batches.
    """
    codes, copies = copies_of(tokenizer, real)
    pixels = copies.cpu().numpy()
    rows: Arrays = {
        "squared_error": squared_errors(real, copies),
        "detail": detail_energies(copies),
        "detail_of_original": detail_energies(real),
        "ssim": ssim_per_clip(real, copies),
        "lpips": np.full(len(real), np.nan),
    }
    if networks.lpips is not None:
        rows["lpips"] = networks.lpips.distances(real.cpu().numpy(), pixels)
    if networks.i3d is not None:
        rows["features"] = networks.i3d.features(pixels)
    config = tokenizer.config
    return rows, {"code_counts": count_codes(codes.cpu().numpy(), config.num_codes, config.num_codebooks)}


def reconstruction_sections(
    clips: Manifest, real: Arrays, copies: Arrays, code_counts: NDArray[np.int64]
) -> dict[str, Any]:
    """Sections ``clips``, ``reconstruction``, ``codebook``, ``fvd`` and ``extremes`` of ``metrics.json``.

    Args:
        clips: the clips that were measured.
        real: from `real_arrays`, for all clips.
        copies: from `tokenizer_arrays`, for all clips.
        code_counts: int64 [M, K], counts of all clips' codes.
    """
    recipe, rates = clips.recipe["clip"], real["fps"][~np.isnan(real["fps"])]
    variance = appearance_numbers(real)["pixel_variance"]
    worst, best = extreme_clips(real, copies)
    psnr = clip_psnr_db(copies["squared_error"], real["sizes"])
    return {
        "clips": {
            "split": clips.url.rpartition("/")[2],
            "num_clips": len(real["key"]),
            "num_clips_in_split": clips.num_samples,
            "num_frames": recipe["num_frames"],
            "resolution": recipe["resolution"],
            "fps_lowest": float(rates.min()) if len(rates) else None,
            "fps_highest": float(rates.max()) if len(rates) else None,
            "fit": recipe.get("fit"),
        },
        "reconstruction": reconstruction_numbers(copies, real["sizes"], variance),
        "codebook": code_numbers(code_counts, len(real["key"])),
        "fvd": _rfvd(real["features"], copies["features"]) if "features" in real else None,
        "extremes": {
            name: [{"key": str(real["key"][clip]), "psnr_db": _finite(psnr[clip])} for clip in clips_of_end]
            for name, clips_of_end in (("worst", worst), ("best", best))
        },
    }


def extreme_clips(real: Arrays, copies: Arrays) -> tuple[list[int], list[int]]:
    """Indices of the clips with the largest and with the smallest mean squared error, the most extreme first.

    If there are few clips, each list has at most half of them, rounded up.
    """
    psnr = clip_psnr_db(copies["squared_error"], real["sizes"])
    number = min(MOST_EXTREMES, -(-len(psnr) // 2))
    order = np.argsort(-psnr, kind="stable").tolist()  # the best first
    return order[::-1][:number], order[:number]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _rfvd(real: NDArray[np.floating], copies: NDArray[np.floating]) -> dict[str, Any]:
    """The rFVD and its number of clips."""
    statistics = FeatureStatistics.of(real)
    return {
        "rfvd": frechet_distance(statistics, FeatureStatistics.of(copies)),
        "num_real": statistics.num,
        "is_singular": statistics.is_singular,
    }
