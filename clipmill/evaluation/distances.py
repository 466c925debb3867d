"""Distances between sets of videos: FVD, and the Inception Score of one set.

FVD (Unterthiner et al. 2018, arXiv 1812.01717) is the Frechet distance of two Gaussians fitted to the I3D logits of two
sets of clips. A set is represented by its size, sum and sum of outer products in float64. These can be added over
batches, machines and sets, and do not depend on how clips are batched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FeatureStatistics", "frechet_distance", "inception_score"]

NUM_SPLITS = 10
"""Number of groups for the Inception Score, as in Salimans et al. 2016 (arXiv 1606.03498)."""
FEWEST_SPLIT = 100
"""Fewer clips are not split: the marginal distribution of a few clips is too noisy."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of the features of a set of clips; ``a + b`` are the moments of both sets together."""

    num: int
    sum: NDArray[np.float64]
    """[D]"""
    sum_outer: NDArray[np.float64]
    """[D, D]: sum over clips of x x^T."""

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureStatistics:
        """The moments of features [N, D]."""
        features = features.astype(np.float64)
        return cls(len(features), features.sum(axis=0), features.T @ features)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(self.num + other.num, self.sum + other.sum, self.sum_outer + other.sum_outer)

    @property
    def is_singular(self) -> bool:
        """Whether the covariance is singular because there are not more clips than feature dimensions."""
        return self.num <= len(self.sum)

    @property
    def mean(self) -> NDArray[np.float64]:
        """[D]"""
        return self.sum / self.num

    @property
    def covariance(self) -> NDArray[np.float64]:
        """[D, D], unbiased (N - 1).

        Raises:
            ValueError: fewer than two clips.
        """
        if self.num < 2:
            raise ValueError(f"the covariance of {self.num} clips is not defined")
        return (self.sum_outer - self.num * np.outer(self.mean, self.mean)) / (self.num - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means m and covariances C (Dowson and Landau 1982).

    With C = R R^T, C1 C2 has the eigenvalues of (R1^T R2)(R1^T R2)^T, so the trace of its root is the sum of the
    singular values of R1^T R2. A singular covariance therefore needs no ridge, and there are no complex values to drop.
    """
    shift = np.square(first.mean - second.mean).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    shared = np.linalg.svd(_root(first).T @ _root(second), compute_uv=False).sum()
    return max(0.0, float(shift + traces - 2 * shared))


def _root(statistics: FeatureStatistics) -> NDArray[np.float64]:
    """R of the covariance R R^T, [D, D].

    Eigenvalues below float64 resolution are zeroed; otherwise their square roots accumulate.
    """
    values, vectors = np.linalg.eigh(statistics.covariance)
    resolved = len(values) * np.finfo(np.float64).eps * (values[-1] + statistics.mean @ statistics.mean)
    return vectors * np.sqrt(np.where(values > resolved, values, 0))


def inception_score(probabilities: NDArray[np.floating]) -> dict[str, float | int]:
    """Exponential of the mean divergence of each clip's class probabilities from their mean (arXiv 1606.03498).

    In the given order, the clips are split into 10 groups, whose sizes differ by at most one clip. Fewer than 100 clips
    are one group.

    Args:
        probabilities: [N, classes], rows that sum to 1.

    Returns:
        ``mean`` and ``std`` (population) over the groups, ``num_splits``, ``num_clips``.
    """
    probabilities = probabilities.astype(np.float64)
    num_splits = NUM_SPLITS if len(probabilities) >= FEWEST_SPLIT else 1
    scores = [_score_of_split(split) for split in np.array_split(probabilities, num_splits)]
    return {
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores)),
        "num_splits": num_splits,
        "num_clips": len(probabilities),
    }


def _score_of_split(probabilities: NDArray[np.float64]) -> float:
    marginal = probabilities.mean(axis=0)
    return float(np.exp(_entropy(marginal) - _entropy(probabilities).mean()))


def _entropy(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy in nats over the last axis."""
    logarithms = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -(probabilities * logarithms).sum(axis=-1)
