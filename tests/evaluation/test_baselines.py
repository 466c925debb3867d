from __future__ import annotations

import math

import numpy as np
import pytest

from clipmill.evaluation.baselines import CodeTables, PairCounts, baseline_scores

SINGLES = ("unigram", "first_frame", "first_code")
PAIRS = ("temporal", "raster")


def tables(codes: np.ndarray, num_codes: int) -> CodeTables:
    counted = CodeTables(num_codes)
    counted.update(codes)
    return counted


def dense(pairs: PairCounts, num_codes: int, num_codebooks: int = 1) -> np.ndarray:
    """The counts as [M, K, K]: rows are the codes before."""
    table = np.zeros(num_codebooks * num_codes**2, np.int64)
    found, counts = pairs.found()
    table[found] = counts
    return table.reshape(num_codebooks, num_codes, num_codes)


def test_counts_of_one_small_clip():
    # t = 2, h = 1, w = 2:  frame 0: 0 1   frame 1: 0 2
    counted = tables(np.array([[[[0, 1]], [[0, 2]]]]), 3)
    assert counted.unigram.tolist() == [[2, 1, 1]]
    assert counted.first_frame.tolist() == [[1, 1, 0]]
    assert counted.first_code.tolist() == [[1, 0, 0]]
    assert dense(counted.temporal, 3).tolist() == [[[1, 0, 0], [0, 0, 1], [0, 0, 0]]]
    assert dense(counted.raster, 3).tolist() == [[[0, 1, 1], [1, 0, 0], [0, 0, 0]]]
    assert (counted.num_clips, counted.num_tokens) == (1, 4)


def test_each_codebook_has_tables_of_its_own():
    codes = np.random.default_rng(3).integers(0, 4, (6, 3, 2, 2, 2))
    both = CodeTables(4, num_codebooks=2)
    both.update(codes)
    for book in range(2):
        one = tables(codes[..., book], 4)
        for name in SINGLES:
            assert np.array_equal(getattr(both, name)[book], getattr(one, name)[0])
        for name in PAIRS:
            assert np.array_equal(dense(getattr(both, name), 4, 2)[book], dense(getattr(one, name), 4)[0])
    assert both.num_tokens == codes.size
    # Of a codebook that says all (always 2) and one that says nothing, the mean.
    codes[..., 1] = 2
    both, one = CodeTables(4, num_codebooks=2), tables(codes[..., 0], 4)
    both.update(codes)
    for kind in ("unigram_nats", "temporal_bigram_nats", "raster_bigram_nats"):
        halved = baseline_scores(one, one)[kind] / 2
        assert baseline_scores(both, both)[kind] == pytest.approx(halved, abs=0.02)


def test_batches_add_up_to_the_tables_of_everything():
    codes = np.random.default_rng(0).integers(0, 50, (60, 3, 2, 2))
    parts, whole = CodeTables(50), tables(codes, 50)
    for part in np.split(codes, [1, 20, 22, 23, 50]):  # longer and shorter ones after each other
        parts.update(part)
    assert parts.num_clips == whole.num_clips
    for name in SINGLES:
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
    for name in PAIRS:
        for ours, theirs in zip(getattr(parts, name).found(), getattr(whole, name).found(), strict=True):
            assert np.array_equal(ours, theirs)


def test_a_codebook_whose_pairs_no_memory_holds():
    num_codes = 2**18  # a table of all pairs: 512 GiB
    generator = np.random.default_rng(4)
    first = generator.integers(0, num_codes, (200, 1, 4, 4))
    followed = np.concatenate([first, num_codes - 1 - first], axis=1)  # each code names the next one
    counted = CodeTables(num_codes)
    for batch in np.split(followed, 10):
        counted.update(batch)
    pairs, counts = counted.temporal.found()
    assert np.array_equal(pairs, np.unique(first * num_codes + num_codes - 1 - first))
    assert counts.sum() == first.size
    scores = baseline_scores(counted, counted)
    # A code's own pair stands once or more often among its counts, and next to nothing is smoothed away.
    assert scores["smoothing"]["temporal_bigram"] == 0.01
    weight = scores["smoothing"]["unigram"]
    without_context = np.log(counted.unigram[0][first] + weight) - np.log(followed.size + weight * num_codes)
    assert scores["temporal_bigram_nats"] == pytest.approx(-without_context.mean() / 2, abs=0.01)


def test_hand_computed_cross_entropies():
    # One place, two latent frames: code 0 is always followed by 1, code 1 by 0; both start as often.
    train = tables(np.array([[0, 1], [1, 0]] * 50).reshape(100, 2, 1, 1), 2)
    val = tables(np.array([[0, 1]]).reshape(1, 2, 1, 1), 2)
    scores = baseline_scores(train, val)
    assert scores["unigram_nats"] == pytest.approx(math.log(2))  # half and half, whatever the smoothing
    # First frame: the unigram, ln 2. Second: p = (50 + m/2) / (50 + m) with the smallest m of the grid, 0.01.
    second = -math.log((50 + 0.005) / (50 + 0.01))
    assert scores["temporal_bigram_nats"] == pytest.approx((math.log(2) + second) / 2)
    assert scores["raster_bigram_nats"] == pytest.approx(scores["temporal_bigram_nats"])  # w = h = 1: the same pairs
    assert scores["unigram_bits"] == pytest.approx(1.0)
    assert scores["smoothing"]["temporal_bigram"] == 0.01


def test_interpolation_of_a_code_never_seen_in_training():
    train = tables(np.zeros((4, 1, 1, 1), np.int64), 4)
    val = tables(np.full((1, 1, 1, 1), 3), 4)
    # (0 + a) / (4 + 4 a) with the largest a of the grid, 10: the choice is made in the baseline's favour.
    assert baseline_scores(train, val)["unigram_nats"] == pytest.approx(-math.log(10 / 44))


def test_a_bigram_without_information_falls_back_to_the_unigram():
    codes = np.random.default_rng(1).integers(0, 16, (40, 4, 4, 4))
    scores = baseline_scores(tables(codes[:20], 16), tables(codes[20:], 16))
    for name in ("temporal_bigram_nats", "raster_bigram_nats"):
        assert scores[name] <= scores["unigram_nats"] + 1e-3
        assert scores[name] == pytest.approx(math.log(16), abs=0.02)


def test_each_bigram_finds_its_own_order():
    generator = np.random.default_rng(2)
    still = np.repeat(generator.integers(0, 32, (64, 1, 4, 4)), 8, axis=1)
    scores = baseline_scores(tables(still[:32], 32), tables(still[32:], 32))
    assert scores["temporal_bigram_nats"] < 0.25 * scores["unigram_nats"]
    assert scores["raster_bigram_nats"] > 0.9 * scores["unigram_nats"]
    stripes = np.repeat(generator.integers(0, 32, (64, 4, 8, 1)), 8, axis=3)
    scores = baseline_scores(tables(stripes[:32], 32), tables(stripes[32:], 32))
    assert scores["raster_bigram_nats"] < 0.25 * scores["unigram_nats"]
    assert scores["temporal_bigram_nats"] > 0.9 * scores["unigram_nats"]


def test_no_validation_tokens_is_an_error():
    with pytest.raises(ValueError, match="no validation tokens"):
        baseline_scores(tables(np.zeros((1, 1, 1, 1), np.int64), 2), CodeTables(2))
