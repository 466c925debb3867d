"""Further metrics on FVD's features: kernel distance, precision, recall, density, coverage, seeds, and clip counts.

N, M: clips of two sets   D: features
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill.evaluation.distances import FeatureStatistics, frechet_distance

__all__ = ["fvd_by_count", "fvd_over_seeds", "kernel_distance", "manifold_scores"]

NEAREST = 5
"""Number of neighbours that define a clip's neighbourhood, as in Naeem et al. 2020."""
NUM_COUNTS = 6
_BLOCK_ROWS = 512
_SEED = 0

Features = NDArray[np.floating]


def kernel_distance(first: Features, second: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (KVD, arXiv 1812.01717).

    Args:
        first: [N, D], N at least 2.
        second: [M, D], M at least 2.
    """
    x, y = first.astype(np.float64), second.astype(np.float64)

    def mean_off_diagonal(values: Features) -> float:
        own = ((values * values).sum(axis=1) / values.shape[1] + 1) ** 3
        return float((_kernel_sum(values, values) - own.sum()) / (len(values) * (len(values) - 1)))

    return mean_off_diagonal(x) + mean_off_diagonal(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel_sum(x: Features, y: Features) -> float:
    blocks = (x[start : start + _BLOCK_ROWS] for start in range(0, len(x), _BLOCK_ROWS))
    return float(sum(((block @ y.T / x.shape[1] + 1) ** 3).sum() for block in blocks))


def manifold_scores(real: Features, made: Features) -> dict[str, float] | None:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) with 5 neighbours.

    Args:
        real: [N, D].
        made: [M, D].

    Returns:
        The four scores; None if a set has not more clips than neighbours.
    """
    if min(len(real), len(made)) <= NEAREST:
        return None
    real_radii, made_radii = _radii(real), _radii(made)
    num_within = np.zeros(len(made))
    is_recalled, is_covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in _distances(real, made):
        within = distances <= real_radii[rows, None]
        num_within += within.sum(axis=0)
        is_covered[rows] = distances.min(axis=1) <= real_radii[rows]
        is_recalled[rows] = (distances <= made_radii[None]).any(axis=1)
    return {
        "precision": float((num_within > 0).mean()),
        "recall": float(is_recalled.mean()),
        "density": float(num_within.mean() / NEAREST),
        "coverage": float(is_covered.mean()),
    }


def _distances(x: Features, y: Features) -> Iterator[tuple[slice, Features]]:
    """Euclidean distances of rows of x to all rows of y, for a block of rows of x at a time."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (y * y).sum(axis=1)
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, len(x)))
        squared = (x[rows] * x[rows]).sum(axis=1)[:, None] + squares - 2 * x[rows] @ y.T
        yield rows, np.sqrt(np.maximum(squared, 0))


def _radii(features: Features) -> Features:
    """Distance of each clip to its `NEAREST`-th neighbour: [N]."""
    return np.concatenate(
        [np.partition(distances, NEAREST, axis=1)[:, NEAREST] for _, distances in _distances(features, features)]
    )  # the nearest is the clip itself


def _fvd(first: Features, second: Features) -> float:
    return frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))


def fvd_over_seeds(real: Features, made: Features, num_seeds: int) -> dict[str, Any] | None:
    """FVD of several seeds, with its deviation.

    Seed s draws half of both sets without replacement. The deviation of these distances estimates the deviation that
    the FVD of the whole sets would have under other seeds (half-sampling). Their mean is the FVD at half the number of
    clips.

    Args:
        real: [N, D].
        made: [M, D].
        num_seeds: number of seeds; nothing is measured below 2.

    Returns:
        ``num_clips`` of each seed, ``mean``, ``deviation`` and ``values``; None if nothing is measured.
    """
    if num_seeds < 2 or min(len(real), len(made)) < 4:
        return None
    num_clips, values = min(len(real), len(made)) // 2, []
    for seed in range(num_seeds):
        random = np.random.default_rng(seed)
        first, second = (random.choice(features, num_clips, replace=False) for features in (real, made))
        values.append(_fvd(first, second))
    return {
        "num_clips": num_clips,
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values, ddof=1)),
        "values": values,
    }


def fvd_by_count(real: Features, made: Features) -> dict[str, Any] | None:
    """FVD of growing numbers of clips n, and a line fitted over 1 / n (as for FID, arXiv 1911.07023).

    Returns:
        ``points`` (``num_clips``, ``fvd``), ``extrapolated`` (to infinitely many clips), ``slope`` and ``r_squared`` of
        the fit; None if there are too few clips for a fit.
    """
    most = min(len(real), len(made))
    if most < 4 * NUM_COUNTS:
        return None
    random = np.random.default_rng(_SEED)
    orders = [random.permutation(len(features)) for features in (real, made)]
    counts = np.linspace(most / NUM_COUNTS, most, NUM_COUNTS).astype(int)
    values = np.array([_fvd(real[orders[0][:count]], made[orders[1][:count]]) for count in counts])
    slope, extrapolated = np.polyfit(1 / counts, values, 1)
    residuals = values - (extrapolated + slope / counts)
    spread = np.square(values - values.mean()).sum()
    return {
        "points": [{"num_clips": int(count), "fvd": float(value)} for count, value in zip(counts, values, strict=True)],
        "extrapolated": float(extrapolated),
        "slope": float(slope),
        "r_squared": float(1 - np.square(residuals).sum() / spread) if spread else None,
    }
