"""Scores that are summed clip by clip: streaming, and the same for any order and any batches of the data.

Pixels are uint8, so every pixel sum here is an exact integer: no rounding, whatever the order. Results are in units of
the pixel range [0, 1]. Shapes: B clips, T frames, H height, W width, K codes, [t, h, w] latents of a clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

__all__ = ["CodeUsage", "ReconstructionScores", "VideoStatistics", "ssim_per_clip"]

_SSIM_WINDOW = 11  # pixels; the Gaussian window (sigma 1.5) of Wang et al. 2004


@dataclass
class ReconstructionScores:
    """Sums behind MSE, NMSE, PSNR and SSIM of reconstructions against their originals."""

    num_clips: int = 0
    num_values: int = 0
    sum_squared_error: int = 0
    sum_values: int = 0
    sum_squares: int = 0
    num_ssim: int = 0
    sum_ssim: float = 0.0

    def update(self, original: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> None:
        """Adds clips: two uint8 arrays [B, T, H, W, 3]."""
        if original.shape != reconstruction.shape:
            raise ValueError(f"original {original.shape} and reconstruction {reconstruction.shape} differ in shape")
        values = original.astype(np.int32)
        error = values - reconstruction
        self.num_clips += len(original)
        self.num_values += original.size
        self.sum_squared_error += int(np.square(error).sum(dtype=np.int64))
        self.sum_values += int(values.sum(dtype=np.int64))
        self.sum_squares += int(np.square(values).sum(dtype=np.int64))
        ssim = ssim_per_clip(original, reconstruction)
        if ssim is not None:
            self.num_ssim += len(ssim)
            self.sum_ssim += float(ssim.sum())

    def result(self) -> dict[str, Any]:
        """The scores, as plain JSON values.

        Returns:
            ``mse`` over all values in [0, 1]; ``data_variance`` of the originals, pooled over clips, places and
            colours; ``nmse`` = mse / data_variance (none for constant data); ``psnr_db`` of the pooled mse (none when
            it is zero); ``ssim``: mean over frames of Wang et al. 2004 (none below 11 pixels).
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
            "psnr_db": -10 * math.log10(mse) if mse else None,
            "ssim": self.sum_ssim / self.num_ssim if self.num_ssim else None,
        }


def ssim_per_clip(original: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Structural similarity (borders reflected), averaged over the frames and colours of each clip.

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
    """How often each code of a codebook occurs."""

    def __init__(self, num_codes: int):
        self.counts: NDArray[np.int64] = np.zeros(num_codes, np.int64)
        self.num_clips = 0

    def update(self, codes: NDArray[np.integer]) -> None:
        """Adds the codes of clips: integers [B, t, h, w] below ``num_codes``."""
        self.num_clips += len(codes)
        self.counts += np.bincount(codes.reshape(-1), minlength=len(self.counts))

    def shares(self) -> NDArray[np.float64]:
        """Share of all tokens that each code takes: float64 [K], sums to 1."""
        return self.counts / max(1, int(self.counts.sum()))

    def result(self) -> dict[str, Any]:
        """The scores, as plain JSON values.

        Returns:
            ``used_share`` of the codes that occur at all; ``entropy_bits`` of the empirical distribution of one code;
            ``perplexity`` = 2 ** entropy; ``bits_per_clip``: what the codes of a clip cost with a code that knows this
            distribution; ``raw_bits_per_clip``: what they cost at log2(K) each.
        """
        if not self.num_clips:
            raise ValueError("no clip was counted")
        shares = self.shares()
        used = shares[shares > 0]
        entropy_bits = float(-(used * np.log2(used)).sum())
        tokens_per_clip = int(self.counts.sum()) / self.num_clips
        return {
            "num_codes": len(self.counts),
            "num_used": len(used),
            "used_share": len(used) / len(self.counts),
            "entropy_bits": entropy_bits,
            "perplexity": 2.0**entropy_bits,
            "tokens_per_clip": tokens_per_clip,
            "bits_per_clip": entropy_bits * tokens_per_clip,
            "raw_bits_per_clip": math.log2(len(self.counts)) * tokens_per_clip,
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
