"""Locates the rows of a batch: from the number of the batch to shards and rows, without any other state."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from clipmill.shards.mixture import MixtureOrder, apportion
from clipmill.shards.order import Order, locate_stored, rank_rows, share_rows

__all__ = ["EvalPlaces", "Rows", "TrainPlaces", "shares", "spread"]

BLOCK_ROWS = 4096
"""Rows that are located together: for fewer rows, numpy's call overhead dominates."""
CACHED_BLOCKS = 4
"""Cached blocks: the one that is read, the one of the look-ahead, and some spare."""


class Rows(NamedTuple):
    """The rows of one batch, [rows] each."""

    positions: np.ndarray
    """int64: position in the run; in an evaluation, number in stored order."""
    shards: np.ndarray
    """int64: number of the shard."""
    rows: np.ndarray
    """int64: row in the shard."""
    weight: np.ndarray
    """float32: 0 for padding rows."""


class TrainPlaces:
    """Rows of a rank's micro-batches: micro-batch j is number j mod M of the M micro-batches of step j div M.

    Args:
        order: order of one data set or a mixture.
        global_batch: G.
        rank: 0 to ``world_size`` - 1.
        world_size: W.
        num_micro_batches: M.
    """

    def __init__(
        self, order: Order | MixtureOrder, global_batch: int, rank: int, world_size: int, num_micro_batches: int
    ) -> None:
        self._order, self._global_batch = order, global_batch
        batch = np.arange(global_batch)
        rows, weight = rank_rows(batch, rank, world_size)
        parts = [share_rows(len(rows), number, num_micro_batches) for number in range(num_micro_batches)]
        # The same for every step: which of its sorted positions are read, and their weights; [M, rows of a
        # micro-batch].
        self._picked = np.stack([rows[picked] for picked, _ in parts])
        self._weight = np.stack([weight[picked] * filled for picked, filled in parts])
        self._block_steps = max(1, BLOCK_ROWS // len(rows))
        self._blocks: OrderedDict[int, Rows] = OrderedDict()

    def __call__(self, number: int) -> Rows:
        """The rows of a micro-batch by its number."""
        step, micro_step = divmod(number, len(self._picked))
        block, index = divmod(step, self._block_steps)
        if block not in self._blocks:
            self._blocks[block] = self._locate(range(block * self._block_steps, (block + 1) * self._block_steps))
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        positions, shards, rows, weight = self._blocks[block]
        return Rows(
            positions[index, micro_step], shards[index, micro_step], rows[index, micro_step], weight[micro_step]
        )

    def _locate(self, steps: range) -> Rows:
        """The rows of several steps: fields [len(steps), M, rows of a micro-batch]; the weights are shared by all
        steps.
        """
        batches = np.stack([self._order.batch_positions(step, self._global_batch) for step in steps])
        positions = batches[:, self._picked]
        shards, rows = self._order.locate(positions.ravel())
        return Rows(positions, shards.reshape(positions.shape), rows.reshape(positions.shape), self._weight)


def shares(max_samples: int, sizes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Number of samples to read of each data set: by weight, and if one has too few, the others fill in.

    Args:
        max_samples: sum of the result, if there are that many samples.
        sizes: int64 [num data sets], samples of each data set.
        slots: int64 [num data sets], their weights, all above 0.

    Returns:
        int64 [num data sets].
    """
    taken = np.zeros_like(sizes)
    while missing := min(max_samples, int(sizes.sum())) - int(taken.sum()):
        weights = np.where(taken < sizes, slots, 0)
        taken = np.minimum(taken + apportion(missing, weights), sizes)
    return taken


def spread(index: np.ndarray, num_taken: np.ndarray | int, num_samples: np.ndarray | int) -> np.ndarray:
    """Spreads n samples evenly over N: the i-th one is number i N div n. With n = N these are all samples, in order.

    Args:
        index: i, int64 [rows], from 0 to n - 1.
        num_taken: n, from 1 to N; one number, or one per row.
        num_samples: N; one number, or one per row.

    Returns:
        Numbers in stored order, int64 [rows], all different.
    """
    # i N itself would overflow int64 if three billion samples were all taken.
    return index * (num_samples // num_taken) + index * (num_samples % num_taken) // num_taken


class EvalPlaces:
    """Rows of an evaluation: samples spread evenly over the start of each data set; each rank takes a contiguous share.

    Args:
        counts: int64 [num_shards], samples of each shard.
        sizes: int64 [num data sets], samples of each data set.
        spans: int64 [num data sets], number of first samples of each data set that the samples are spread over.
        taken: int64 [num data sets], number of samples to read of each data set.
        rank: 0 to ``world_size`` - 1.
        world_size: W.
        batch_size: most rows of a batch.
    """

    def __init__(
        self,
        counts: np.ndarray,
        sizes: np.ndarray,
        spans: np.ndarray,
        taken: np.ndarray,
        rank: int,
        world_size: int,
        batch_size: int,
    ) -> None:
        self._shard_ends = np.cumsum(counts)
        self._spans, self._taken = spans, taken
        self._first_stored = np.cumsum(sizes) - sizes
        self._taken_ends = np.cumsum(taken)
        self._num_samples = int(np.sum(taken))
        self._share = -(-self._num_samples // world_size)
        self._rank = rank
        self.num_batches = -(-self._share // batch_size)

    def __call__(self, number: int) -> Rows:
        """The rows of a batch by its number, from 0 to ``num_batches`` - 1."""
        picked, filled = share_rows(self._share, number, self.num_batches)
        index = self._rank * self._share + picked
        weight = filled * (index < self._num_samples)
        part, offset = locate_stored(self._taken_ends, np.minimum(index, self._num_samples - 1))
        stored = self._first_stored[part] + spread(offset, self._taken[part], self._spans[part])
        return Rows(stored, *locate_stored(self._shard_ends, stored), weight.astype(np.float32))
