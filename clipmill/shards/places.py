"""Where the rows of a batch are: from its number to shards, without any other state."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from clipmill.shards.mixture import MixtureOrder, apportion
from clipmill.shards.order import Order, locate_stored, rank_rows, share_rows

__all__ = ["EvalPlaces", "Rows", "TrainPlaces", "shares", "spread"]

BLOCK_ROWS = 4096
"""Rows that are located together: for a few of them numpy's calls cost more than the numbers."""
CACHED_BLOCKS = 4
"""One is read, one is looked ahead into."""


class Rows(NamedTuple):
    """The rows of one batch, [rows] each."""

    positions: np.ndarray
    """int64: position in the run; in an evaluation, number in stored order."""
    shards: np.ndarray
    """int64."""
    rows: np.ndarray
    """int64, in the shard."""
    weight: np.ndarray
    """float32: 0 where a row only fills up."""


class TrainPlaces:
    """Micro-batch j of a rank is number j mod M of the M that make up its part of step j div M.

    Args:
        order: of one data set or a mix.
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
        # Of every step alike: which of its sorted positions are read, and what they weigh; [M, rows of a micro-batch].
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
        """Of several steps: fields [len(steps), M, rows of a micro-batch], but for the weights, which all share."""
        batches = np.stack([self._order.batch_positions(step, self._global_batch) for step in steps])
        positions = batches[:, self._picked]
        shards, rows = self._order.locate(positions.ravel())
        return Rows(positions, shards.reshape(positions.shape), rows.reshape(positions.shape), self._weight)


def shares(max_samples: int, sizes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """How many samples of each data set are read: by weight, and what one has too few of (or none) the others give.

    Args:
        max_samples: of all data sets together; fewer only where there are fewer.
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
    """Where the i-th of n samples that are taken of N is: i N div n, an even spread; all in order where n = N.

    Args:
        index: i, int64 [rows], from 0 to n - 1.
        num_taken: n, from 1 to N; one for each row or for all.
        num_samples: N; one for each row or for all.

    Returns:
        Numbers in stored order, int64 [rows], all different.
    """
    # i N itself would leave int64 where three billion samples are all taken.
    return index * (num_samples // num_taken) + index * (num_samples % num_taken) // num_taken


class EvalPlaces:
    """Samples spread over the first ones of one data set, or of several one after the other; each rank has a part.

    Args:
        counts: int64 [num_shards], samples of each shard.
        sizes: int64 [num data sets], samples of each data set.
        spans: int64 [num data sets], over how many first samples of each those that are read are spread.
        taken: int64 [num data sets], how many of each are read.
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
