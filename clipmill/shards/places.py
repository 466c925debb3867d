"""Where the rows of a batch are: from its number to shards, without any other state."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from clipmill.shards.mix import Mix
from clipmill.shards.order import Order, locate_stored, part_rows, rank_rows

__all__ = ["EvalPlaces", "Rows", "TrainPlaces"]

BLOCK_ROWS = 1024
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
        self, order: Order | Mix, global_batch: int, rank: int, world_size: int, num_micro_batches: int
    ) -> None:
        self._order, self._global_batch = order, global_batch
        self._rank, self._world_size = rank, world_size
        self._num_micro_batches = num_micro_batches
        share = -(-global_batch // world_size)
        self._block_length = max(1, BLOCK_ROWS * num_micro_batches // share)  # in micro-batches
        self._blocks: OrderedDict[int, Rows] = OrderedDict()

    def __call__(self, number: int) -> Rows:
        """The rows of a micro-batch by its number."""
        block, index = divmod(number, self._block_length)
        if block not in self._blocks:
            first = block * self._block_length
            self._blocks[block] = self._locate(range(first, first + self._block_length))
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        return Rows(*(field[index] for field in self._blocks[block]))

    def _locate(self, numbers: range) -> Rows:
        """Of several micro-batches: fields [len(numbers), rows of a micro-batch]."""
        positions, weights = zip(*(self._positions(number) for number in numbers), strict=True)
        stacked = np.stack(positions)
        shards, rows = self._order.locate(stacked.ravel())
        return Rows(stacked, shards.reshape(stacked.shape), rows.reshape(stacked.shape), np.stack(weights))

    def _positions(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        step, micro_step = divmod(number, self._num_micro_batches)
        positions = self._order.batch_positions(step, self._global_batch)
        positions, weight = rank_rows(positions, self._rank, self._world_size)
        picked, filled = part_rows(len(positions), micro_step, self._num_micro_batches)
        return positions[picked], weight[picked] * filled


class EvalPlaces:
    """The first samples of one data set, or of several one after the other, in stored order; each rank has a part.

    Args:
        counts: int64 [num_shards], samples of each shard.
        sizes: int64 [num data sets], samples of each data set.
        taken: int64 [num data sets], how many of each are read.
        rank: 0 to ``world_size`` - 1.
        world_size: W.
        batch_size: most rows of a batch.
    """

    def __init__(
        self, counts: np.ndarray, sizes: np.ndarray, taken: np.ndarray, rank: int, world_size: int, batch_size: int
    ) -> None:
        self._shard_ends = np.cumsum(counts)
        self._first_stored = np.cumsum(sizes) - sizes
        self._taken_ends = np.cumsum(taken)
        self._num_samples = int(np.sum(taken))
        self._share = -(-self._num_samples // world_size)
        self._rank = rank
        self.num_batches = -(-self._share // batch_size)

    def __call__(self, number: int) -> Rows:
        """The rows of a batch by its number, from 0 to ``num_batches`` - 1."""
        picked, filled = part_rows(self._share, number, self.num_batches)
        index = self._rank * self._share + picked
        weight = filled * (index < self._num_samples)
        part, offset = locate_stored(self._taken_ends, np.minimum(index, self._num_samples - 1))
        stored = self._first_stored[part] + offset
        return Rows(stored, *locate_stored(self._shard_ends, stored), weight.astype(np.float32))
