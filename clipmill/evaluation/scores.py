"""Scores that are summed clip by clip: streaming, and the same for any order and any batches of the data.

Pixels are uint8, so every pixel sum here is an exact integer: no rounding, whatever the order. Results are in units of
the pixel range [0, 1].

B: clips   T, H, W: frames, height, width   t, h, w: the same of the latents   M: codebooks of K codes each
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

__all__ = ["CodeUsage", "ReconstructionScores", "VideoStatistics", "psnr_db", "ssim_per_clip"]

_SSIM_WINDOW = 11  # pixels; the Gaussian window (sigma 1.5) of Wang et al. 2004


@dataclass
class ReconstructionScores:
    """Sums behind MSE, NMSE, PSNR, SSIM and LPIPS of reconstructions against their originals."""

    num_clips: int = 0
    num_values: int = 0
    sum_squared_error: int = 0
    sum_values: int = 0
    sum_squares: int = 0
    num_ssim: int = 0
    sum_ssim: float = 0.0
    num_lpips: int = 0
    sum_lpips: float = 0.0

    def update(
        self,
        original: NDArray[np.uint8],
        reconstruction: NDArray[np.uint8],
        lpips: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Adds clips.

        Args:
            original: uint8 [B, T, H, W, 3].
            reconstruction: uint8 [B, T, H, W, 3].
            lpips: float64 [B], their perceptual distances, where a network measured them.

        Returns:
            The mean square error of each clip, in units of [0, 1]: float64 [B].
        """
        if original.shape != reconstruction.shape:
            raise ValueError(f"original {original.shape} and reconstruction {reconstruction.shape} differ in shape")
        values = original.astype(np.int32)
        per_clip = np.square(values - reconstruction).sum(axis=(1, 2, 3, 4), dtype=np.int64)
        self.num_clips += len(original)
        self.num_values += original.size
        self.sum_squared_error += int(per_clip.sum())
        self.sum_values += int(values.sum(dtype=np.int64))
        self.sum_squares += int(np.square(values).sum(dtype=np.int64))
        ssim = ssim_per_clip(original, reconstruction)
        if ssim is not None:
            self.num_ssim += len(ssim)
            self.sum_ssim += float(ssim.sum())
        if lpips is not None:
            self.num_lpips += len(lpips)
            self.sum_lpips += float(lpips.sum())
        return per_clip / (values[0].size * 255**2)

    def result(self) -> dict[str, Any]:
        """The scores, as plain JSON values.

        Returns:
            ``mse`` over all values in [0, 1]; ``data_variance`` of the originals, pooled over clips, places and
            colours; ``nmse`` = mse / data_variance (none for constant data); ``psnr_db`` of the pooled mse at a range
            of 1 (none when it is zero); ``ssim``: mean over frames of Wang et al. 2004 (none below 11 pixels);
            ``lpips``: mean over frames (none without a network).
        """
        if not self.num_values:
            raise ValueError("no clip was scored")
        mse = self.sum_squared_error / self.num_values / 255**2
        variance = _variance(self.num_values, self.sum_values, self.sum_squares)
        return {
            "num_clips": self.num_clips,
            "mse": mse,
            "data_variance": variance,
            "nmse": mse / variance if variance else None,
            "psnr_db": psnr_db(mse),
            "ssim": self.sum_ssim / self.num_ssim if self.num_ssim else None,
            "lpips": self.sum_lpips / self.num_lpips if self.num_lpips else None,
        }


def psnr_db(mse: float) -> float | None:
    """Peak signal-to-noise ratio in decibels of a mean square error in units of [0, 1]; none of no error."""
    return -10 * math.log10(mse) if mse else None


def ssim_per_clip(original: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Structural similarity at a data range of 1 (borders reflected), averaged over each clip's frames and colours.

    Args:
        original: uint8 [B, T, H, W, 3].
        reconstruction: uint8 [B, T, H, W, 3].

    Returns:
        float64 [B], or None when a side is shorter than the window of 11 pixels.
    """
    num_clips, num_frames, height, width, _ = original.shape
    if min(height, width) < _SSIM_WINDOW:
        return None
    per_clip = np.empty(num_clips, np.float64)
    for clip in range(num_clips):  # a clip at a time: torchmetrics stacks five copies of its input
        frames = [
            torch.from_numpy(np.ascontiguousarray(video[clip])).permute(0, 3, 1, 2).float() / 255
            for video in (reconstruction, original)
        ]
        scores = structural_similarity_index_measure(*frames, data_range=1.0, reduction="none")
        per_clip[clip] = scores.double().reshape(num_frames).mean().item()
    return per_clip


class CodeUsage:
    """How often each code of each codebook occurs."""

    def __init__(self, num_codes: int, num_codebooks: int = 1):
        self.counts: NDArray[np.int64] = np.zeros((num_codebooks, num_codes), np.int64)
        self.num_clips = 0

    def update(self, codes: NDArray[np.integer]) -> None:
        """Adds the codes of clips: integers below K, [B, t, h, w] or, of several codebooks, [B, t, h, w, M]."""
        num_codebooks, num_codes = self.counts.shape
        self.num_clips += len(codes)
        for counts, column in zip(self.counts, codes.reshape(-1, num_codebooks).T, strict=True):
            counts += np.bincount(column, minlength=num_codes)

    def result(self) -> dict[str, Any]:
        """The scores, as plain JSON values.

        Returns:
            ``used_share`` of the M * K codes that occur at all; ``entropy_bits`` of the empirical distribution of one
            code and ``perplexity`` = 2 ** entropy, both means over the codebooks; ``bits_per_clip``: what the codes of
            a clip cost with a code that knows these distributions; ``raw_bits_per_clip``: what they cost at log2(K)
            each; ``sorted_counts`` of all codes, most frequent first.
        """
        if not self.num_clips:
            raise ValueError("no clip was counted")
        num_codebooks, num_codes = self.counts.shape
        shares = self.counts / self.counts.sum(axis=1, keepdims=True)
        entropy_bits = -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(axis=1)
        tokens_per_clip = int(self.counts.sum()) / self.num_clips
        num_used = int((self.counts > 0).sum())
        return {
            "num_codes": num_codes,
            "num_codebooks": num_codebooks,
            "num_used": num_used,
            "used_share": num_used / self.counts.size,
            "entropy_bits": float(entropy_bits.mean()),
            "perplexity": float((2.0**entropy_bits).mean()),
            "tokens_per_clip": tokens_per_clip,
            "bits_per_clip": float(entropy_bits.mean()) * tokens_per_clip,
            "raw_bits_per_clip": math.log2(num_codes) * tokens_per_clip,
            "sorted_counts": np.sort(self.counts, axis=None)[::-1].tolist(),
        }


@dataclass
class VideoStatistics:
    """What clips look like in four numbers: brightness, contrast, and how much they move.

    Necessary, not sufficient: samples that match real clips here may still be poor, those that do not are.
    """

    num_clips: int = 0
    num_values: int = 0
    sum_values: int = 0
    sum_squares: int = 0
    num_differences: int = 0
    sum_absolute_differences: int = 0
    sum_squared_differences: int = 0

    def update(self, clips: NDArray[np.uint8]) -> None:
        """Adds clips: uint8 [B, T, H, W, 3]."""
        values = clips.astype(np.int32)
        difference = np.diff(values, axis=1)
        self.num_clips += len(clips)
        self.num_values += clips.size
        self.sum_values += int(values.sum(dtype=np.int64))
        self.sum_squares += int(np.square(values).sum(dtype=np.int64))
        self.num_differences += difference.size
        self.sum_absolute_differences += int(np.abs(difference).sum(dtype=np.int64))
        self.sum_squared_differences += int(np.square(difference).sum(dtype=np.int64))

    def result(self) -> dict[str, Any]:
        """The statistics, as plain JSON values.

        Returns:
            ``pixel_mean`` and ``pixel_variance`` of all values in [0, 1]; ``frame_change``: mean absolute difference
            of a value to the frame before; ``frame_change_energy``: mean squared difference.
        """
        if not self.num_clips:
            raise ValueError("no clip was measured")
        differences = max(1, self.num_differences)  # clips of one frame do not move
        return {
            "num_clips": self.num_clips,
            "pixel_mean": self.sum_values / self.num_values / 255,
            "pixel_variance": _variance(self.num_values, self.sum_values, self.sum_squares),
            "frame_change": self.sum_absolute_differences / differences / 255,
            "frame_change_energy": self.sum_squared_differences / differences / 255**2,
        }


def _variance(count: int, total: int, total_of_squares: int) -> float:
    """Population variance in units of [0, 1], from exact integer sums of values in [0, 255]."""
    return (count * total_of_squares - total * total) / (count * count) / 255**2
