"""The order of several data sets mixed by weight: like that of one data set, a pure function of (seed, position).

    n_d  slots of data set d, of 1,000 in all: its weight      G  global batch, samples per step
    P_d  streams of data set d                                 W  world size, ranks

Position p uses slot p mod 1,000 of a fixed arrangement, which assigns each slot to a data set d. The sample's number
within d, its *counter*, is (p div 1,000) n_d + (slots of d before this one). Each data set has its own `Order` over its
counters, and so its own epochs. The k-th slot of d lies at fraction (k + phase of d) / n_d of the arrangement, with a
keyed phase, so that every range of positions holds very nearly the right share of each data set.

Step k takes positions [k G, (k + 1) G), stably sorted by (data set, epoch, stream), and rank r takes the r-th share of
these rows. So a batch holds the same samples for any W, and a rank reads few data sets and streams. A step takes n_d G
/ 1,000 samples of data set d. If that is a whole number, P_d is its largest divisor up to 64, as for a single data set.
Otherwise no number of streams can be served evenly, and P_d is that share rounded down, from 1 to 64.

**Any change here changes the order of every run over a mixture.**
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipmill.shards.order import MAX_STREAMS, MIX, Order, derive_keys, num_streams

__all__ = ["NUM_SLOTS", "MixtureOrder", "apportion", "node_streams", "streams_of_datasets"]

NUM_SLOTS = 1000
"""Resolution of a weight: one slot is a thousandth."""


def apportion(total: int, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Splits ``total`` by weight into whole numbers; the largest remainders are rounded up.

    Args:
        total: sum of the result.
        weights: at least one, not negative, not all zero.

    Returns:
        int64 [len(weights)].
    """
    share = total * np.asarray(weights, np.float64) / np.sum(weights)
    whole = np.floor(share).astype(np.int64)
    largest_first = np.argsort(whole - share, kind="stable")
    whole[largest_first[: total - whole.sum()]] += 1
    return whole


def streams_of_datasets(global_batch: int, slots: np.ndarray) -> list[int]:
    """P_d of each data set.

    Args:
        global_batch: G.
        slots: int64 [num data sets], `NUM_SLOTS` in all. A single data set has all of them, and the same streams as
            without a mixture.
    """
    shares = [divmod(global_batch * int(slots_of_one), NUM_SLOTS) for slots_of_one in slots]
    return [num_streams(share) if share and not rest else min(MAX_STREAMS, max(1, share)) for share, rest in shares]


def node_streams(global_batch: int, slots: np.ndarray, num_ranks: int, world_size: int) -> np.ndarray:
    """Number of streams of each data set that the ranks of each node read: int64 [num nodes, num data sets].

    Args:
        global_batch: G.
        slots: int64 [num data sets].
        num_ranks: ranks per node; consecutive ranks share a node.
        world_size: W.
    """
    streams = np.array(streams_of_datasets(global_batch, slots))
    share = -(-global_batch // world_size)
    node_edges = np.minimum(np.arange(0, world_size + num_ranks, num_ranks) * share, global_batch)
    part_edges = global_batch * np.cumsum([0, *slots]) / NUM_SLOTS
    # Where each node's share begins and ends in each data set, in rows of a batch and then in streams.
    edges = (node_edges[:, None] - part_edges[:-1]) / np.diff(part_edges) * streams
    slack = 0 if len(slots) == 1 else 1  # the shares of a batch vary by about a row, and these edges with them
    first = np.clip(np.floor(edges[:-1] - slack), 0, streams)
    return (np.clip(np.ceil(edges[1:] + slack), 0, streams) - first).astype(np.int64)


class MixtureOrder:
    """Maps positions to samples of the mixed data sets; see `Order` for the arguments.

    Shards are numbered through all data sets, in their order.

    Args:
        counts: for each data set int64 [num_shards], samples of each of its shards.
        slots: int64 [num data sets], each at least 1, `NUM_SLOTS` in all.
        seed: any integer.
        global_batch: G.
        window: w, in samples of a stream.

    Raises:
        UserError: a data set holds no sample.
    """

    def __init__(
        self, counts: Sequence[np.ndarray], slots: np.ndarray, seed: int, global_batch: int, window: int
    ) -> None:
        assert len(counts) == len(slots)
        assert np.sum(slots) == NUM_SLOTS
        assert np.min(slots) > 0
        keys = derive_keys(seed, MIX, np.arange(len(slots)))
        streams = streams_of_datasets(global_batch, slots)
        self._orders = [Order(*each, window) for each in zip(counts, map(int, keys), streams, strict=True)]
        self._slots = np.asarray(slots, np.int64)
        self._arrangement = _arrange(self._slots, keys >> np.uint64(32))
        is_part = self._arrangement[:, None] == np.arange(len(slots))  # [NUM_SLOTS, data sets]
        self._slots_before = (np.cumsum(is_part, axis=0) - is_part)[np.arange(NUM_SLOTS), self._arrangement]
        self._first_shards = np.cumsum([0, *map(len, counts)])

    def count(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data set of each position, and its counter there: both int64 [n]."""
        block, slot = np.divmod(np.asarray(positions, np.int64), NUM_SLOTS)
        part = self._arrangement[slot]
        return part, block * self._slots[part] + self._slots_before[slot]

    def batch_positions(self, step: int, global_batch: int) -> np.ndarray:
        """The positions of one step, stably sorted by (data set, epoch, stream): int64 [G]."""
        positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        part, counter = self.count(positions)
        stream, epoch = np.empty_like(counter), np.empty_like(counter)
        for number in np.unique(part):
            here = part == number
            stream[here], epoch[here] = self._orders[number].streams_and_epochs(counter[here])
        return positions[np.lexsort((stream, epoch, part))]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in the shard of each position: both int64 [n]."""
        part, counter = self.count(positions)
        shard, row = np.empty_like(counter), np.empty_like(counter)
        for number in np.unique(part):
            here = part == number
            own_shard, row[here] = self._orders[number].locate(counter[here])
            shard[here] = self._first_shards[number] + own_shard
        return shard, row


def _arrange(slots: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """The data set of each slot: int64 [NUM_SLOTS].

    Args:
        slots: int64 [num data sets].
        phases: uint64 [num data sets], below 2**32, in units of a slot's distance / 2**32.
    """
    part = np.repeat(np.arange(len(slots)), slots)
    ordinal = np.arange(NUM_SLOTS) - np.repeat(np.cumsum(slots) - slots, slots)
    # Both operands are whole numbers below 2**53, so the quotient is the same float on every machine.
    place = (ordinal * 2**32 + phases[part].astype(np.int64)) / slots[part]
    return part[np.argsort(place, kind="stable")]
