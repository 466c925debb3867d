from __future__ import annotations

import numpy as np
import pytest

from clipmill.evaluation.distances import FeatureStatistics, frechet_distance
from clipmill.evaluation.manifold import fvd_by_count, fvd_over_seeds, kernel_distance, manifold_scores


def features(seed: int, num: int, shift: float = 0.0, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (num, dim)).astype(np.float32)


def test_the_kernel_distance_is_the_sum_over_all_pairs():
    x, y = features(0, 7).astype(np.float64), features(1, 9, 0.5).astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 8 + 1) ** 3)

    own_x = np.mean([kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    own_y = np.mean([kernel(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
    mixed = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(own_x + own_y - 2 * mixed, rel=1e-10)


def test_precision_recall_density_and_coverage_by_hand():
    real, made = features(0, 40), np.concatenate([features(1, 30), features(2, 10, 50.0)])
    own = np.linalg.norm(real[:, None] - real[None], axis=-1)
    radii = np.sort(own, axis=1)[:, 5]
    cross = np.linalg.norm(real[:, None] - made[None], axis=-1)
    made_radii = np.sort(np.linalg.norm(made[:, None] - made[None], axis=-1), axis=1)[:, 5]
    scores = manifold_scores(real, made)
    assert scores is not None
    within = cross <= radii[:, None]
    assert scores["precision"] == within.any(axis=0).mean() <= 0.75  # a quarter of the samples is far away
    assert scores["recall"] == (cross <= made_radii[None]).any(axis=1).mean()
    assert scores["density"] == pytest.approx(within.sum() / (5 * 40))
    assert scores["coverage"] == (cross.min(axis=1) <= radii).mean()
    assert manifold_scores(real[:5], made) is None


def test_the_deviation_over_seeds_is_that_of_fresh_sets():
    found = fvd_over_seeds(features(0, 400), features(1, 400, 0.3), 40)
    assert found is not None
    assert (found["num_clips"], len(found["values"])) == (200, 40)
    assert fvd_over_seeds(features(0, 400), features(1, 400), 0) is None

    def fresh(seed: int) -> float:
        sets = (features(100 + seed, 400), features(900 + seed, 400, 0.3))
        return frechet_distance(*map(FeatureStatistics.of, sets))

    assert found["deviation"] == pytest.approx(np.std([fresh(seed) for seed in range(60)], ddof=1), rel=0.5)


def test_fvd_falls_with_the_clips_to_the_extrapolated_value():
    found = fvd_by_count(features(0, 1200), features(1, 1200))
    assert found is not None
    counts = [point["num_clips"] for point in found["points"]]
    values = [point["fvd"] for point in found["points"]]
    assert counts == sorted(counts)
    assert counts[-1] == 1200
    assert values[0] > values[-1] > found["extrapolated"]
    assert abs(found["extrapolated"]) < 0.3 * values[-1] + 0.02  # two sets of one distribution: 0
    assert found["slope"] > 0
    assert fvd_by_count(features(0, 20), features(1, 20)) is None
