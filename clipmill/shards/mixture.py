"""The order of several data sets mixed by weight, as a pure function of (seed, position) like that of one.

    n_d  slots of data set d, of 1,000 in all: its weight      G  global batch, samples a step
    P_d  streams of data set d                                 W  world size, ranks

Position p is slot p mod 1,000 of an arrangement that stays the same: it says from which data set d the sample comes.
That is the sample number (p div 1,000) n_d + (slots of d before this one) of d, its *counter*, and d has an
`Order` of its own over its counters, so epochs of its own. The k-th slot of d stands at (k + phase of d) / n_d of
the way, with a keyed phase, so that every stretch of positions holds very nearly its share of each data set.

Step k takes positions [k G, (k + 1) G), stably sorted by (data set, epoch, stream), and rank r the r-th part of these
rows: the same samples for any W, and a rank keeps to few data sets and streams. Of n_d G / 1,000 samples a step
P_d is the largest divisor up to 64 where that is a whole number, as for a single data set; else no number of streams
is met evenly, and it is that share up to 64.

**Any change here changes the order of every run over a mix.**
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipmill.shards.order import MAX_STREAMS, MIX, Order, derive_keys, num_streams

__all__ = ["NUM_SLOTS", "MixtureOrder", "apportion", "node_streams", "streams_of_datasets"]

NUM_SLOTS = 1000
"""Steps of a weight: a thousandth."""


def apportion(total: int, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Splits ``total`` by weight into whole numbers: the largest remainders are rounded up.

    Args:
        total: what they add up to.
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
        slots: int64 [num data sets], `NUM_SLOTS` in all: one alone has them all, and the streams it always has.
    """
    shares = [divmod(global_batch * int(slots_of_one), NUM_SLOTS) for slots_of_one in slots]
    return [num_streams(share) if share and not rest else min(MAX_STREAMS, max(1, share)) for share, rest in shares]


def node_streams(global_batch: int, slots: np.ndarray, num_ranks: int, world_size: int) -> np.ndarray:
    """How many streams of each data set the ranks of each node read: int64 [num nodes, num data sets].

    Args:
        global_batch: G.
        slots: int64 [num data sets].
        num_ranks: ranks of a node, side by side.
        world_size: W.
    """
    streams = np.array(streams_of_datasets(global_batch, slots))
    share = -(-global_batch // world_size)
    node_edges = np.minimum(np.arange(0, world_size + num_ranks, num_ranks) * share, global_batch)
    part_edges = global_batch * np.cumsum([0, *slots]) / NUM_SLOTS
    # In rows of a batch, then in streams: where each node begins and ends in each data set.
    edges = (node_edges[:, None] - part_edges[:-1]) / np.diff(part_edges) * streams
    slack = 0 if len(slots) == 1 else 1  # the shares of a batch vary by a row or so, and with them these edges
    first = np.clip(np.floor(edges[:-1] - slack), 0, streams)
    return (np.clip(np.ceil(edges[1:] + slack), 0, streams) - first).astype(np.int64)


class MixtureOrder:
    """Which sample of which data set is at a position; `Order` says more of the arguments.

    The shards of all data sets are numbered one data set after the other.

    Args:
        counts: of each data set int64 [num_shards], samples of each of its shards.
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
    # Both numbers of the quotient are whole and below 2**53, so it is the same float on every machine.
    place = (ordinal * 2**32 + phases[part].astype(np.int64)) / slots[part]
    return part[np.argsort(place, kind="stable")]
