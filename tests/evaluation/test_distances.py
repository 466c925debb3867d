from __future__ import annotations

import numpy as np
import pytest

from clipmill.evaluation.distances import FeatureStatistics, frechet_distance, inception_score


def gaussian(mean: np.ndarray, covariance: np.ndarray, num: int = 1000) -> FeatureStatistics:
    """Statistics of a set of clips with exactly these moments."""
    return FeatureStatistics(num, num * mean, (num - 1) * covariance + num * np.outer(mean, mean))


def random_covariance(seed: int, dim: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(dim, 2 * dim))
    return matrix @ matrix.T / dim


def features(seed: int, num: int, dim: int = 12) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(num, dim)) @ generator.normal(size=(dim, dim)) + generator.normal(size=dim)


def test_statistics_are_those_of_numpy():
    found = features(0, 50)
    statistics = FeatureStatistics.of(found)
    assert statistics.num == 50
    assert statistics.mean == pytest.approx(found.mean(axis=0), rel=1e-12)
    assert statistics.covariance == pytest.approx(np.cov(found, rowvar=False), rel=1e-10)


def test_two_halves_merge_into_the_whole():
    exact = np.random.default_rng(1).integers(-64, 64, (40, 8)) / 16  # sums of such fractions do not round
    halves = FeatureStatistics.of(exact[:13]) + FeatureStatistics.of(exact[13:])
    whole = FeatureStatistics.of(exact)
    assert halves.num == whole.num
    assert np.array_equal(halves.sum, whole.sum)
    assert np.array_equal(halves.sum_outer, whole.sum_outer)
    found, others = features(2, 60).astype(np.float32), FeatureStatistics.of(features(3, 60))
    halves = FeatureStatistics.of(found[30:]) + FeatureStatistics.of(found[:30])
    whole = FeatureStatistics.of(found)
    assert whole.sum.dtype == whole.sum_outer.dtype == np.float64  # float32 sums would be off by 1e-6
    assert frechet_distance(halves, others) == pytest.approx(frechet_distance(whole, others), rel=1e-11)


def test_a_shifted_mean_costs_its_square():
    covariance, shift = random_covariance(4, 10), np.linspace(-1, 2, 10)
    distance = frechet_distance(gaussian(np.zeros(10), covariance), gaussian(shift, covariance))
    assert distance == pytest.approx(shift @ shift, rel=1e-9)


def test_commuting_covariances_have_a_closed_form():
    rotation, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))
    first, second = np.arange(1.0, 7), np.arange(6.0, 0, -1)
    a, b = ((rotation * deviations**2) @ rotation.T for deviations in (first, second))
    distance = frechet_distance(gaussian(np.ones(6), a), gaussian(np.ones(6), b))
    assert distance == pytest.approx(np.square(first - second).sum(), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_and_distance_has_no_direction():
    first, second = FeatureStatistics.of(features(6, 100)), FeatureStatistics.of(features(7, 100))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    assert frechet_distance(first, second) > 1


def test_any_covariances_agree_with_the_eigenvalues_of_their_product():
    a, b = random_covariance(8, 30), random_covariance(9, 30)
    root_trace = np.sqrt(np.linalg.eigvals(a @ b).real).sum()  # similar to a^(1/2) b a^(1/2)
    expected = np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_distance(gaussian(np.zeros(30), a), gaussian(np.zeros(30), b)) == pytest.approx(expected, rel=1e-9)


def test_any_covariances_agree_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = random_covariance(10, 30), random_covariance(11, 30)
    expected = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(gaussian(np.zeros(30), a), gaussian(np.zeros(30), b)) == pytest.approx(expected, rel=1e-9)


def test_fewer_clips_than_features_are_told_and_still_measured():
    found = features(12, 9, dim=40)
    few, twice = FeatureStatistics.of(found), FeatureStatistics.of(2 * found)
    assert few.is_singular
    assert not FeatureStatistics.of(features(13, 41, dim=40)).is_singular
    # 2 x has the mean 2 m and the covariance 4 C: |m|^2 + tr C, however many dimensions are empty.
    expected = few.mean @ few.mean + np.trace(few.covariance)
    assert frechet_distance(few, twice) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-10)


def test_one_clip_has_no_covariance():
    one = FeatureStatistics.of(features(14, 1))
    with pytest.raises(ValueError, match="covariance of 1 clips"):
        frechet_distance(one, one)


def test_the_inception_score_counts_classes_that_are_certain():
    assert inception_score(np.full((40, 5), 0.2))["mean"] == pytest.approx(1)
    certain = np.eye(4)[np.arange(160) % 4]
    score = inception_score(certain)
    assert score == pytest.approx({"mean": 4, "std": 0, "num_splits": 10, "num_clips": 160})
    assert inception_score(np.eye(4)[np.zeros(40, int)])["mean"] == pytest.approx(1)  # collapsed to one class


def test_the_inception_score_is_the_mean_over_ten_runs_of_clips():
    probabilities = np.random.default_rng(15).dirichlet(np.full(7, 0.3), 153)
    scores = []
    for split in np.array_split(probabilities, 10):
        divergence = (split * (np.log(split) - np.log(split.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    score = inception_score(probabilities)
    assert score["mean"] == pytest.approx(np.mean(scores), rel=1e-9)
    assert score["std"] == pytest.approx(np.std(scores), rel=1e-9)
    assert inception_score(probabilities[:99])["num_splits"] == 1
