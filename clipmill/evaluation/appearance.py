"""Measures the appearance of each clip without a network: colours, motion, flicker, objects, and a simple descriptor.

Pixels are uint8, so every sum over pixels is an exact integer: the same on any device and in any batches.

B: clips   T, H, W: frames, height, width   x_t: frame t, in units of [0, 1]

    motion energy   mean of (x_t+1 - x_t)^2
    flicker energy  mean of (x_t+2 - 2 x_t+1 + x_t)^2: four times the motion energy if pixels jump back and forth
    saturation      mean over pixels of the largest colour value minus the smallest
    object size     share of a frame that differs from the background colour, for clips that have a single one
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clipmill.evaluation.distances import FeatureStatistics, frechet_distance
from clipmill.evaluation.parts import Arrays

__all__ = ["APPEARANCE", "appearance_numbers", "appearance_of", "compare_appearance", "total_variation"]

NUM_BINS = 32
"""Bins of a colour's histogram."""
_GROUND_LEVELS = 8
"""To find the background colour, each channel is reduced to this number of levels."""
_OBJECT_SHARES = (0.002, 0.4)
"""Range of mean object sizes for which masks are reliable: smaller is noise; larger has no single background colour."""
_OBJECT_STEP = 40
"""A pixel belongs to an object if a colour value (0 to 255) differs from the background's by more than this."""
_CELLS = 4
"""Cells of the stand-in descriptor along time, height and width."""
_FAINT = 1e-4
"""Added to energies before the logarithm. For scale: half a grey level, squared, is 4e-6; h264's noise is 1e-5."""

_POSITIVE = (
    "pixel_variance", "frame_change", "motion_energy", "flicker_energy", "saturation",
    "object_size", "object_variation",
)  # fmt: skip
"""Positive numbers, for which a ratio is meaningful."""
APPEARANCE = (
    "sizes", "sums", "squares", "change", "change_squares", "jerk_squares", "saturation", "histogram",
    "object_size", "object_variation", "descriptor",
)  # fmt: skip
"""The arrays that `appearance_of` returns."""


def appearance_of(video: Tensor) -> Arrays:
    """Measures clips uint8 [B, T, H, W, 3].

    Returns:
        Arrays by name, with one row per clip:

        - ``sizes`` int64 [B, 3]: T, H, W
        - ``sums`` and ``squares`` int64 [B, 3]: of each colour
        - ``change``, ``change_squares`` int64 [B]: sums of the absolute and of the squared first difference in time
        - ``jerk_squares`` int64 [B]: sum of the squared second difference in time
        - ``saturation`` int64 [B]
        - ``histogram`` int64 [B, 3, NUM_BINS]
        - ``object_size`` float64 [B]: mean share of the frame that the object covers; NaN if masks are not reliable
        - ``object_variation`` float64 [B]: standard deviation of that share over frames, divided by its mean; or NaN
        - ``descriptor`` float32 [B, D]
    """
    change = _difference(video.to(torch.int16))
    jerk = _difference(change)
    size, variation = _objects(video)
    found = {
        "sizes": torch.tensor(video.shape[1:4]).expand(len(video), 3),
        "sums": video.flatten(1, 3).sum(1, dtype=torch.int64),
        "squares": video.int().square().flatten(1, 3).sum(1, dtype=torch.int64),
        "change": change.abs().flatten(1).sum(1, dtype=torch.int64),
        "change_squares": change.int().square().flatten(1).sum(1, dtype=torch.int64),
        "jerk_squares": jerk.int().square().flatten(1).sum(1, dtype=torch.int64),
        "saturation": (video.amax(-1).int() - video.amin(-1)).flatten(1).sum(1, dtype=torch.int64),
        "histogram": _histogram(video),
        "object_size": size,
        "object_variation": variation,
        "descriptor": _descriptor(video, change, jerk),
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def _difference(values: Tensor) -> Tensor:
    return values[:, 1:] - values[:, :-1]


def _histogram(video: Tensor) -> Tensor:
    """How often each of `NUM_BINS` equal ranges of each colour occurs: int64 [B, 3, NUM_BINS]."""
    rows = torch.arange(len(video) * 3, device=video.device).view(-1, 1, 1, 1, 3)
    bins = rows * NUM_BINS + torch.div(video, 256 // NUM_BINS, rounding_mode="floor")
    return torch.bincount(bins.flatten(), minlength=len(video) * 3 * NUM_BINS).view(-1, 3, NUM_BINS)


def _objects(video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean object size of each clip and its relative deviation over the frames: float64 [B] each."""
    sizes = torch.full((len(video),), torch.nan, dtype=torch.float64)
    variations = sizes.clone()
    step = 256 // _GROUND_LEVELS
    for number, clip in enumerate(video):  # one clip at a time: as int64, its colours take eight times the memory
        levels = torch.div(clip.flatten(0, 2), step, rounding_mode="floor").long()
        colours = (levels[:, 0] * _GROUND_LEVELS + levels[:, 1]) * _GROUND_LEVELS + levels[:, 2]
        counts = torch.bincount(colours, minlength=_GROUND_LEVELS**3)
        ground = clip.flatten(0, 2)[colours == counts.argmax()].double().mean(0).round().to(torch.int16)
        is_object = (clip.to(torch.int16) - ground).abs().amax(-1) > _OBJECT_STEP  # [T, H, W]
        shares = is_object.flatten(1).double().mean(1)
        mean = shares.mean().item()
        if _OBJECT_SHARES[0] <= mean <= _OBJECT_SHARES[1]:
            sizes[number], variations[number] = mean, (shares.std(correction=0) / mean).cpu()
    return sizes, variations


def _descriptor(video: Tensor, change: Tensor, jerk: Tensor) -> Tensor:
    """Colours in cells of time and place, and logarithms of energies in cells of place: float32 [B, D]."""
    values = video.permute(0, 4, 1, 2, 3).float() / 255  # [B, 3, T, H, W]
    colours = F.adaptive_avg_pool3d(values, _CELLS)
    across, down = (_square_of_step(values, axis) for axis in (-1, -2))
    first, second = (
        step.permute(0, 4, 1, 2, 3).float().div(255).square().mean(1, keepdim=True) for step in (change, jerk)
    )
    logs = [
        torch.log(_FAINT + F.adaptive_avg_pool3d(energy, (1, _CELLS, _CELLS))) / 4
        for energy in (across, down, first, second)
        if energy.shape[2]
    ]
    return torch.cat([part.flatten(1) for part in (colours, *logs)], dim=1)


def _square_of_step(values: Tensor, axis: int) -> Tensor:
    """Squared difference of neighbours along an axis, mean over colours: [B, 1, T, H, W] less one at that axis."""
    return values.diff(dim=axis).square().mean(1, keepdim=True)


# ------------------------------------------------------------------------------------------------- of sets of clips


def appearance_numbers(found: Arrays) -> dict[str, Any]:
    """Numbers of a set of clips, as plain JSON values.

    Args:
        found: the arrays of `APPEARANCE`, one row per clip.

    Returns:
        ``num_clips``; ``pixel_mean`` and ``pixel_variance`` of all values; ``frame_change``, the mean absolute change
        of a value to the next frame; ``motion_energy``, ``flicker_energy``; ``colour_mean`` and ``colour_deviation`` of
        red, green and blue; ``saturation``; ``easy_masks``, the share of clips with reliable masks; ``object_size`` and
        ``object_variation``, means over these clips (None if there are none).
    """
    sizes = found["sizes"].astype(object)  # Python's integers: sums of a large set leave int64
    frames, pixels = sizes[:, 0], sizes[:, 1] * sizes[:, 2]
    num_values = int((frames * pixels).sum()) * 3
    num_changes = int(((frames - 1) * pixels).sum()) * 3
    num_jerks = int((np.maximum(frames - 2, 0) * pixels).sum()) * 3
    sums, squares = found["sums"].sum(axis=0), found["squares"].sum(axis=0)
    is_easy = ~np.isnan(found["object_size"])
    return {
        "num_clips": len(sizes),
        "pixel_mean": int(sums.sum()) / num_values / 255,
        "pixel_variance": variance_of(num_values, int(sums.sum()), int(squares.sum())),
        "frame_change": _mean(found["change"], num_changes) / 255,
        "motion_energy": _mean(found["change_squares"], num_changes) / 255**2,
        "flicker_energy": _mean(found["jerk_squares"], num_jerks) / 255**2,
        "colour_mean": [int(total) * 3 / num_values / 255 for total in sums],
        "colour_deviation": [
            variance_of(num_values // 3, int(total), int(square)) ** 0.5
            for total, square in zip(sums, squares, strict=True)
        ],
        "saturation": int(found["saturation"].sum()) * 3 / num_values / 255,
        "easy_masks": float(is_easy.mean()),
        "object_size": float(found["object_size"][is_easy].mean()) if is_easy.any() else None,
        "object_variation": float(found["object_variation"][is_easy].mean()) if is_easy.any() else None,
    }


def _mean(sums: NDArray[np.int64], count: int) -> float:
    return int(sums.sum()) / max(1, count)  # clips of one frame do not move


def variance_of(count: int, total: int, total_of_squares: int) -> float:
    """Population variance in units of [0, 1], from exact integer sums of values in [0, 255]."""
    return (count * total_of_squares - total * total) / (count * count) / 255**2


def compare_appearance(real: Arrays, other: Arrays) -> dict[str, Any]:
    """Compares a set of clips with the real ones, as plain JSON values.

    Args:
        real: the arrays of `APPEARANCE` of the real clips.
        other: the same arrays of the other clips.

    Returns:
        ``real`` and ``other``: `appearance_numbers` of each; ``ratio``: other / real of the positive numbers (None if
        real is 0 or missing); ``colour_distance``: total variation distance of the colour histograms, mean over
        colours, from 0 to 1; ``stand_in_distance``: Frechet distance of the descriptors (None with fewer than two clips
        in a set), only comparable with other values of itself.
    """
    ours, theirs = appearance_numbers(other), appearance_numbers(real)
    distance = None
    if min(len(real["sizes"]), len(other["sizes"])) > 1:
        statistics = [FeatureStatistics.of(found["descriptor"]) for found in (real, other)]
        distance = frechet_distance(*statistics)
    return {
        "real": theirs,
        "other": ours,
        "ratio": {name: _ratio(ours[name], theirs[name]) for name in _POSITIVE},
        "colour_distance": float(
            np.mean(
                [
                    total_variation(*(found["histogram"][:, colour].sum(axis=0) for found in (real, other)))
                    for colour in range(3)
                ]
            )
        ),
        "stand_in_distance": distance,
    }


def total_variation(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """Total variation distance of two histograms: 0 if their shares are equal, 1 if they have nothing in common."""
    return float(np.abs(first / first.sum() - second / second.sum()).sum() / 2)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if reference and value is not None else None
