"""Scores of reconstructions and of codes, clip by clip. They do not depend on the order or the batches of the data.

Pixels are uint8, so every sum over pixels is an exact integer, in any order. Results are in units of the pixel range
[0, 1].

B: clips   T, H, W: frames, height, width   t, h, w: the same for latents   M: codebooks of K codes each
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from clipmill.evaluation.parts import Arrays

__all__ = [
    "RECONSTRUCTION",
    "clip_psnr_db",
    "code_numbers",
    "count_codes",
    "detail_energies",
    "psnr_db",
    "reconstruction_numbers",
    "squared_errors",
    "ssim_per_clip",
]

_SSIM_WINDOW = 11  # pixels; the Gaussian window (sigma 1.5) of Wang et al. 2004


RECONSTRUCTION = ("squared_error", "detail", "detail_of_original", "ssim", "lpips")
"""The arrays that are kept of each clip's reconstruction; see `reconstruction_numbers`."""


def squared_errors(original: Tensor, reconstruction: Tensor) -> NDArray[np.int64]:
    """The squared error of each clip, summed over all its values (0 to 255): int64 [B], exact.

    Args:
        original: uint8 [B, T, H, W, 3].
        reconstruction: uint8 [B, T, H, W, 3].
    """
    if original.shape != reconstruction.shape:
        raise ValueError(f"original {original.shape} and reconstruction {reconstruction.shape} differ in shape")
    return (original.int() - reconstruction).square().flatten(1).sum(1, dtype=torch.int64).cpu().numpy()


def detail_energies(video: Tensor) -> NDArray[np.int64]:
    """Energy of the high frequencies of each clip: the sum of its frames' squared five-point Laplacian.

    The Laplacian is four times a value minus its neighbours above, below, left and right: 0 in a flat picture, largest
    in a chequerboard. Values at the border are excluded, because they lack neighbours.

    Args:
        video: uint8 [B, T, H, W, 3].

    Returns:
        int64 [B], exact.
    """
    values = video.to(torch.int16)
    inner = values[:, :, 1:-1, 1:-1]
    neighbours = values[:, :, :-2, 1:-1] + values[:, :, 2:, 1:-1] + values[:, :, 1:-1, :-2] + values[:, :, 1:-1, 2:]
    return (4 * inner - neighbours).int().square().flatten(1).sum(1, dtype=torch.int64).cpu().numpy()


def reconstruction_numbers(found: Arrays, sizes: NDArray[np.int64], variance: float) -> dict[str, Any]:
    """The scores of a set of clips, as plain JSON values.

    Args:
        found: ``squared_error``, ``detail`` and ``detail_of_original`` int64 [N], ``ssim`` and ``lpips`` float64 [N],
            NaN if not measured.
        sizes: int64 [N, 3], T, H and W of each clip.
        variance: of the originals, over all values of all clips, in units of [0, 1].

    Returns:
        ``mse`` over all values in [0, 1]; ``data_variance``; ``nmse`` = mse / data_variance (None for constant data);
        ``psnr_db`` of the pooled mse at a range of 1 (None if mse is 0); ``high_frequency_energy`` divided by that of
        the originals (None if that is 0); ``ssim``: mean over frames, Wang et al. 2004 (None below 11 pixels);
        ``lpips``: mean over frames (None without a network); ``per_clip``: mean, deviation, 5th percentile and median
        of the clips' own PSNR and SSIM.
    """
    values_per_clip = sizes.prod(axis=1) * 3
    errors = found["squared_error"]
    mse = int(errors.sum()) / int(values_per_clip.sum()) / 255**2
    psnr = clip_psnr_db(errors, sizes)
    detail = int(found["detail_of_original"].sum())
    return {
        "num_clips": len(errors),
        "mse": mse,
        "data_variance": variance,
        "nmse": mse / variance if variance else None,
        "psnr_db": psnr_db(mse),
        "high_frequency_energy": int(found["detail"].sum()) / detail if detail else None,
        "ssim": _mean(found["ssim"]),
        "lpips": _mean(found["lpips"]),
        "per_clip": {"psnr_db": _spread(psnr[np.isfinite(psnr)]), "ssim": _spread(found["ssim"])},
    }


def clip_psnr_db(squared_error: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """PSNR of each clip in decibels, infinite without an error: float64 [N]. See `reconstruction_numbers`."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(squared_error / (sizes.prod(axis=1) * 3 * 255**2))


def _mean(values: NDArray[np.float64]) -> float | None:
    return None if np.isnan(values).any() else float(values.mean())


def _spread(values: NDArray[np.float64]) -> dict[str, float] | None:
    """Mean, deviation and quantiles of the clips' values; None if they were not measured."""
    if not len(values) or np.isnan(values).any():
        return None
    fifth, median = np.percentile(values, [5, 50])
    spread = {"mean": values.mean(), "deviation": values.std(), "percentile_5": fifth, "median": median}
    return {name: float(value) for name, value in spread.items()}


def psnr_db(mse: float) -> float | None:
    """Peak signal-to-noise ratio in decibels of a mean squared error in units of [0, 1]; None if the error is 0."""
    return -10 * math.log10(mse) if mse else None


def ssim_per_clip(original: Tensor, reconstruction: Tensor) -> NDArray[np.float64]:
    """Structural similarity at a data range of 1 (borders reflected), averaged over each clip's frames and colours.

    Args:
        original: uint8 [B, T, H, W, 3].
        reconstruction: uint8 [B, T, H, W, 3], on the same device; the computation runs there.

    Returns:
        float64 [B]; NaN when a side is shorter than the window of 11 pixels.
    """
    num_clips, num_frames, height, width, _ = original.shape
    per_clip = np.full(num_clips, np.nan)
    if min(height, width) < _SSIM_WINDOW:
        return per_clip
    for clip in range(num_clips):  # one clip at a time: torchmetrics stacks five copies of its input
        frames = [video[clip].permute(0, 3, 1, 2).float() / 255 for video in (reconstruction, original)]
        scores = structural_similarity_index_measure(*frames, data_range=1.0, reduction="none")
        per_clip[clip] = scores.double().reshape(num_frames).mean().item()
    return per_clip


def count_codes(codes: NDArray[np.integer], num_codes: int, num_codebooks: int) -> NDArray[np.int64]:
    """How often each code of each codebook occurs: int64 [M, K].

    Args:
        codes: below K, [B, t, h, w] or with several codebooks [B, t, h, w, M].
        num_codes: K.
        num_codebooks: M.
    """
    columns = codes.reshape(-1, num_codebooks).T
    return np.stack([np.bincount(column, minlength=num_codes) for column in columns]).astype(np.int64)


def code_numbers(counts: NDArray[np.int64], num_clips: int) -> dict[str, Any]:
    """How a set of clips uses the codes, as plain JSON values.

    Args:
        counts: int64 [M, K], of `count_codes`, over all clips.
        num_clips: at least one.

    Returns:
        ``used_share``: share of the M * K codes that occur; ``entropy_bits``: entropy of a codebook's codes, and
        ``perplexity`` = 2 ** entropy, both means over codebooks; ``bits_per_clip``: the clip's number of codes times
        ``entropy_bits``; ``raw_bits_per_clip``: the same with log2(K); ``sorted_counts`` of all codes, most frequent
        first.
    """
    num_codebooks, num_codes = counts.shape
    shares = counts / counts.sum(axis=1, keepdims=True)
    entropy_bits = -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(axis=1)
    tokens_per_clip = int(counts.sum()) / num_clips
    num_used = int((counts > 0).sum())
    return {
        "num_codes": num_codes,
        "num_codebooks": num_codebooks,
        "num_used": num_used,
        "used_share": num_used / counts.size,
        "entropy_bits": float(entropy_bits.mean()),
        "perplexity": float((2.0**entropy_bits).mean()),
        "tokens_per_clip": tokens_per_clip,
        "bits_per_clip": float(entropy_bits.mean()) * tokens_per_clip,
        "raw_bits_per_clip": math.log2(num_codes) * tokens_per_clip,
        "sorted_counts": np.sort(counts, axis=None)[::-1].tolist(),
    }
