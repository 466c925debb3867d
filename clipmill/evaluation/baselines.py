"""Table predictors of codes: baselines that a trained prior must beat.

Three tables are counted on the training codes: how often each code occurs (*unigram*), which code follows which at
the same place one latent frame later (*temporal bigram*), and which follows which in raster order (*raster bigram*).
Their cross-entropy on the validation codes is what counting alone achieves. If a context is missing (in the first
latent frame, or for the first code of a clip), a bigram uses the unigram. Each codebook has separate tables. A raster
bigram depends on the same codebook's code at the previous place, not on other codes at the same place.

Smoothing (MacKay and Peto 1995, "A hierarchical Dirichlet language model"): with counts n, K codes and N tokens
    unigram p(c)     = (n(c) + a) / (N + a K)
    bigram  p(c | b) = (n(b, c) + m p(c)) / (n(b) + m),   n(b) = sum over c of n(b, c)
a and m are chosen from a grid by the *validation* cross-entropy itself. This favours the baselines, so a prior that
beats them beats the best table of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill.evaluation.parts import Arrays

__all__ = ["CodeTables", "PairCounts", "baseline_scores"]

_UNIGRAM_GRID = (0.001, 0.01, 0.1, 0.5, 1.0, 10.0)
_BIGRAM_GRID = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e6)


_Run = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Distinct pairs in ascending order, and how often each occurs."""


class PairCounts:
    """Counts how often one code follows another, batch by batch. Stores only pairs that occur, not a whole table.

    With M codebooks of K codes, a pair is the number (m K + before) K + after. Memory is 16 bytes per distinct pair,
    and as much again while pairs are added.
    """

    def __init__(self, num_codes: int, num_codebooks: int = 1) -> None:
        self._num_codes, self._num_codebooks = num_codes, num_codebooks
        self._runs: list[_Run] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        """Each run is more than twice as long as the next, so a new run is merged with few: n pairs cost n log n."""

    def update(self, before: NDArray[np.int64], after: NDArray[np.int64]) -> None:
        """Counts pairs of codes: int64 [..., M] each, below K."""
        pairs = (np.arange(self._num_codebooks) * self._num_codes + before) * self._num_codes + after
        self.add(*np.unique(pairs, return_counts=True))

    def add(self, pairs: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Adds the result of another counter's `found`."""
        run = (pairs, counts)
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            run = _merge(self._runs.pop(), run)
        self._runs.append(run)

    def found(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The distinct pairs in ascending order, and how often each occurs: both int64 [N]."""
        while len(self._runs) > 1:
            self._runs.append(_merge(self._runs.pop(), self._runs.pop()))
        return self._runs[0]

    def counts_of(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often these distinct pairs occur: int64 [n]."""
        known, counts = self.found()
        _, here, there = np.intersect1d(pairs, known, assume_unique=True, return_indices=True)
        found = np.zeros(len(pairs), np.int64)
        found[here] = counts[there]
        return found

    def context_counts(self) -> NDArray[np.int64]:
        """How often each code comes before another: int64 [M * K]."""
        pairs, counts = self.found()
        contexts = np.zeros(self._num_codebooks * self._num_codes, np.int64)
        np.add.at(contexts, pairs // self._num_codes, counts)
        return contexts


def _merge(one: _Run, other: _Run) -> _Run:
    pairs, counts = (np.concatenate(parts) for parts in zip(one, other, strict=True))
    order = np.argsort(pairs, kind="stable")
    pairs, counts = pairs[order], counts[order]
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    return pairs[first], np.add.reduceat(counts, first)


@dataclass
class CodeTables:
    """Counts codes and pairs of codes, batch by batch, for M codebooks of K codes."""

    num_codes: int
    num_codebooks: int = 1
    num_clips: int = 0
    unigram: NDArray[np.int64] = field(init=False)
    """[M, K]: occurrences of each code."""
    first_frame: NDArray[np.int64] = field(init=False)
    """[M, K]: occurrences in the first latent frame, where no earlier one exists."""
    first_code: NDArray[np.int64] = field(init=False)
    """[M, K]: occurrences at the first place of a clip."""
    temporal: PairCounts = field(init=False)
    """Pairs of the code at the same place one latent frame earlier, and the code."""
    raster: PairCounts = field(init=False)
    """Pairs of the code at the previous place in raster order, and the code."""

    def __post_init__(self) -> None:
        singles = (self.num_codebooks, self.num_codes)
        self.unigram, self.first_frame, self.first_code = (np.zeros(singles, np.int64) for _ in range(3))
        self.temporal, self.raster = (PairCounts(self.num_codes, self.num_codebooks) for _ in range(2))

    def update(self, codes: NDArray[np.integer]) -> None:
        """Counts the codes of clips: integers below K, [B, t, h, w] or with several codebooks [B, t, h, w, M]."""
        codes = codes.astype(np.int64).reshape(*codes.shape[:4], self.num_codebooks)
        row = codes.reshape(len(codes), -1, self.num_codebooks)
        self.num_clips += len(codes)
        for counts, seen in ((self.unigram, row), (self.first_frame, codes[:, 0]), (self.first_code, row[:, 0])):
            for book in range(self.num_codebooks):
                counts[book] += np.bincount(seen[..., book].reshape(-1), minlength=self.num_codes)
        self.temporal.update(codes[:, :-1], codes[:, 1:])
        self.raster.update(row[:, :-1], row[:, 1:])

    def arrays(self) -> Arrays:
        """All counts, as input for `merged`."""
        (pairs, counts), (next_pairs, next_counts) = self.temporal.found(), self.raster.found()
        return {
            "num_clips": np.array(self.num_clips),
            "unigram": self.unigram,
            "first_frame": self.first_frame,
            "first_code": self.first_code,
            "temporal_pairs": pairs,
            "temporal_counts": counts,
            "raster_pairs": next_pairs,
            "raster_counts": next_counts,
        }

    @classmethod
    def merged(cls, parts: Iterable[Arrays], num_codes: int, num_codebooks: int) -> CodeTables:
        """The tables of several sets of clips together, from the `arrays` of each."""
        tables = cls(num_codes, num_codebooks)
        for arrays in parts:
            tables._add(arrays)
        return tables

    def _add(self, arrays: Arrays) -> None:
        self.num_clips += int(arrays["num_clips"])
        self.unigram += arrays["unigram"]
        self.first_frame += arrays["first_frame"]
        self.first_code += arrays["first_code"]
        self.temporal.add(arrays["temporal_pairs"], arrays["temporal_counts"])
        self.raster.add(arrays["raster_pairs"], arrays["raster_counts"])

    @property
    def num_tokens(self) -> int:
        """Number of codes counted."""
        return int(self.unigram.sum())


def baseline_scores(train: CodeTables, val: CodeTables) -> dict[str, Any]:
    """Cross-entropy of the three tables fitted on ``train``, on the tokens of ``val``.

    Returns:
        ``unigram_nats``, ``temporal_bigram_nats``, ``raster_bigram_nats`` per token, the same as ``_bits``, and the
        ``smoothing`` chosen for each (a or m in the module's docstring).
    """
    if not val.num_tokens:
        raise ValueError("no validation tokens were counted")
    unigram_weight, unigram_nats = min(
        ((weight, _unigram_nats(train, val, weight)) for weight in _UNIGRAM_GRID), key=lambda found: found[1]
    )
    log_unigram = _log_unigram(train, unigram_weight)  # [M, K]
    temporal_weight, temporal_nats = _best_bigram(train.temporal, val.temporal, val.first_frame, log_unigram)
    raster_weight, raster_nats = _best_bigram(train.raster, val.raster, val.first_code, log_unigram)
    nats = {"unigram": unigram_nats, "temporal_bigram": temporal_nats, "raster_bigram": raster_nats}
    return {
        **{f"{name}_nats": value for name, value in nats.items()},
        **{f"{name}_bits": value / math.log(2) for name, value in nats.items()},
        "smoothing": {"unigram": unigram_weight, "temporal_bigram": temporal_weight, "raster_bigram": raster_weight},
    }


def _log_unigram(train: CodeTables, weight: float) -> NDArray[np.float64]:
    """Log-probabilities of the codes: float64 [M, K]."""
    weighted = train.unigram + weight
    return np.log(weighted) - np.log(weighted.sum(1, keepdims=True))


def _unigram_nats(train: CodeTables, val: CodeTables, weight: float) -> float:
    return float(-(val.unigram * _log_unigram(train, weight)).sum() / val.num_tokens)


def _best_bigram(
    train_pairs: PairCounts,
    val_pairs: PairCounts,
    val_without_context: NDArray[np.int64],
    log_unigram: NDArray[np.float64],
) -> tuple[float, float]:
    """The smoothing weight with the lowest validation cross-entropy in the grid, and that cross-entropy in nats."""
    pairs, occurrences = val_pairs.found()
    context, after = np.divmod(pairs, log_unigram.shape[1])  # context: m K + before
    pair_counts = train_pairs.counts_of(pairs)
    context_counts = train_pairs.context_counts()[context]
    prior_shares = np.exp(log_unigram)[context // log_unigram.shape[1], after]
    nats_without_context = -float((val_without_context * log_unigram).sum())
    num_tokens = int(occurrences.sum() + val_without_context.sum())

    def nats(weight: float) -> float:
        probabilities = (pair_counts + weight * prior_shares) / (context_counts + weight)
        return (nats_without_context - float(occurrences @ np.log(probabilities))) / num_tokens

    return min(((weight, nats(weight)) for weight in _BIGRAM_GRID), key=lambda found: found[1])
