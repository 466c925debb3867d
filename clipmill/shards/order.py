"""The order of samples as a pure function of (seed, position): there is no shuffle buffer and no state to store.

    N  samples of the data set        G  global batch, samples per step
    P  streams, see `num_streams`     W  world size, ranks
    w  window, consecutive samples of one stream that are shuffled together

A run takes positions 0, 1, 2, ... Position p is in epoch e = p div N; with i = p mod N it belongs to stream
s = i mod P and is number i div P of it. Each epoch permutes the shards with a key and concatenates their samples. The
result is cut into P contiguous streams; the first N mod P are one sample longer, which makes (s, number) <-> i a
bijection. Inside a stream, each window of w samples is permuted. The first window of stream s has w - floor(s w / P)
samples, so that streams do not all enter the next window, and shard, at the same time.

Step k takes positions [k G, (k + 1) G), stably sorted by (epoch, stream), and rank r of W takes the r-th share of
ceil(G / W) rows. So a batch holds the same samples for any W, each sample comes once per epoch, and the state to resume
from is one integer. If P divides G and W divides P, a rank reads only its own P / W streams, and so few shards.

Keyed permutations of n >= 64 values are Feistel networks of 8 rounds on the bits of the index (M. Luby, C. Rackoff,
"How to construct pseudorandom permutations from pseudorandom functions", 1988), restricted to n values by walking the
cycle until an image is below n (J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", 2002). On fewer bits
they mix badly: some orders of five shards would be twice as frequent as others. Fewer than 64 values are therefore
ranked by their hashes. Hashes, round functions and keys are outputs of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast
splittable pseudorandom number generators", 2014), because numpy does not promise that its generators stay the same.

**Any change here changes the order of every run.** tests/shards/order_reference.py implements the same in plain
integers.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from clipmill.errors import UserError

__all__ = [
    "Order",
    "derive_keys",
    "locate_stored",
    "num_streams",
    "share_rows",
    "rank_rows",
    "same_video_pairs",
    "splitmix64",
]

MAX_STREAMS = 64
CACHED_EPOCHS = 4
"""Shard orders that are cached. A batch spans at most two epochs unless the data set is smaller than the batch."""
NUM_ROUNDS = 8
FEW = 64
"""Permutations of fewer values than this rank the values' hashes."""
SHARDS, WINDOWS, MIX, AUGMENTATION = range(4)
"""Purposes of keys: the first number of `derive_keys` after the seed."""


def num_streams(global_batch: int) -> int:
    """P: the largest divisor of the global batch up to 64."""
    return max(divisor for divisor in range(1, MAX_STREAMS + 1) if global_batch % divisor == 0)


def share_rows(num_rows: int, share: int, num_shares: int) -> tuple[np.ndarray, np.ndarray]:
    """One of ``num_shares`` equal shares of ``range(num_rows)``.

    Returns:
        Rows int64 and weights float32, both [ceil(num_rows / num_shares)]. Beyond the last row, it is repeated with
        weight 0.
    """
    size = -(-num_rows // num_shares)
    rows = np.arange(share * size, (share + 1) * size)
    return np.minimum(rows, num_rows - 1), (rows < num_rows).astype(np.float32)


def rank_rows(positions: np.ndarray, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of a batch that one rank takes.

    Args:
        positions: int64 [G], from `Order.batch_positions`.
        rank: 0 to ``world_size`` - 1.
        world_size: number of ranks.

    Returns:
        Positions int64 and weights float32, both [ceil(G / W)]; weight 0 marks padding rows.
    """
    rows, weight = share_rows(len(positions), rank, world_size)
    return positions[rows], weight


def locate_stored(ends: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row of samples by their number in stored order.

    Args:
        ends: int64 [num_shards], number of samples up to the end of each shard.
        index: int64 [n], numbers of samples, from 0.

    Returns:
        Shards and rows, both int64 [n]; shards without samples are skipped.
    """
    shard = np.searchsorted(ends, index, side="right")
    return shard, index - np.where(shard == 0, 0, ends[shard - 1])


def same_video_pairs(global_batch: float, num_streams: int, window: int, clips_per_video: float) -> float:
    """Expected number of pairs in one batch that come from the same video: P C(G/P, 2) (c - 1) / (w - 1).

    Clips of a video are stored side by side, so they are in one stream and, except at window ends, in one window. A
    batch takes G / P samples of a stream. Within a window of w samples all pairs of positions are equally likely, so a
    second sample is one of the c - 1 other clips of the first one's video with probability (c - 1) / (w - 1).

    Args:
        global_batch: G; in a mixture, the data set's share of it.
        num_streams: P.
        window: w, in samples.
        clips_per_video: c.
    """
    per_stream = max(1.0, global_batch / num_streams)
    pairs = num_streams * per_stream * (per_stream - 1) / 2
    return pairs * min(1.0, (clips_per_video - 1) / max(1, window - 1))


class Order:
    """Maps positions of a run to samples.

    The only state is a cache of the shard orders of a few epochs, 16 bytes per shard and epoch.

    Args:
        counts: int64 [num_shards], samples of each shard; shards without samples are allowed.
        seed: any integer; taken modulo 2**64.
        num_streams: P.
        window: w, in samples.

    Raises:
        UserError: the data set holds no samples.
    """

    def __init__(self, counts: np.ndarray, seed: int, num_streams: int, window: int) -> None:
        assert num_streams > 0
        assert window > 0
        self.num_samples = int(np.sum(counts))
        self.num_streams = num_streams
        self.window = window
        self._counts = np.asarray(counts, np.int64)
        self._seed = seed
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        if self.num_samples == 0:
            raise UserError("the data set holds no samples; add videos and run its stage again")

    def batch_positions(self, step: int, global_batch: int) -> np.ndarray:
        """The positions of one step, stably sorted by (epoch, stream): int64 [G]."""
        positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        return positions[np.lexsort(self.streams_and_epochs(positions))]

    def streams_and_epochs(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stream and epoch of each position, the keys that batches are sorted by (epoch first): both int64 [n]."""
        epoch, index = np.divmod(positions, self.num_samples)
        return index % self.num_streams, epoch

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in the shard of each position.

        Args:
            positions: int64 [n], not negative, in any order.

        Returns:
            Shards and rows, both int64 [n].
        """
        epoch, index = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        place = self._place_in_epoch(epoch, index)
        shard = np.empty_like(place)
        row = np.empty_like(place)
        for number in np.unique(epoch):
            here = epoch == number
            order, ends = self._shard_order(int(number))
            slot, row[here] = locate_stored(ends, place[here])
            shard[here] = order[slot]
        return shard, row

    def _place_in_epoch(self, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Index of each position ``index`` of an epoch in the concatenation of that epoch's shards: int64 [n]."""
        offset, stream = np.divmod(index, self.num_streams)
        shortest, num_longer = divmod(self.num_samples, self.num_streams)
        stream_start = stream * shortest + np.minimum(stream, num_longer)
        stream_length = shortest + (stream < num_longer)

        first = self.window - stream * self.window // self.num_streams
        window = np.where(offset < first, 0, 1 + (offset - first) // self.window)
        window_start = np.where(window == 0, 0, first + (window - 1) * self.window)
        window_end = np.minimum(first + window * self.window, stream_length)

        key = derive_keys(self._seed, WINDOWS, epoch, stream, window)
        permuted = _permute(offset - window_start, window_end - window_start, key)
        return stream_start + window_start + permuted

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the number of samples up to the end of each: both int64
        [num_shards].
        """
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        slots = np.arange(len(self._counts))
        order = _permute(slots, np.full_like(slots, len(slots)), derive_keys(self._seed, SHARDS, np.array([epoch])))
        self._epochs[epoch] = order, np.cumsum(self._counts[order])
        if len(self._epochs) > CACHED_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]


def splitmix64(state: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Output ``number`` (from 0) of the SplitMix64 generators seeded with ``state``; uint64, modulo 2**64."""
    mixed = state + (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def derive_keys(seed: int, purpose: int, *numbers: np.ndarray) -> np.ndarray:
    """One key for each tuple of numbers: every number picks the generator's output that seeds the next generator.

    Args:
        seed: any integer; taken modulo 2**64.
        purpose: one of `SHARDS`, `WINDOWS`, `MIX` and `AUGMENTATION`.
        numbers: integers [n] or [1].

    Returns:
        uint64 [n] or [1].
    """
    key = splitmix64(np.array([seed % 2**64], np.uint64), np.array([purpose], np.uint64))
    for number in numbers:
        key = splitmix64(key, number.astype(np.uint64))
    return key


def _permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The image of each index under the keyed permutation of ``range(size)``.

    Args:
        index: int64 [n], at least 0 and below ``size``.
        size: int64 [n], at least 1.
        key: uint64 [n] or [1].

    Returns:
        int64 [n].
    """
    key = np.broadcast_to(key, index.shape)
    few = size < FEW
    image = np.empty_like(index)
    image[few] = _permute_few(index[few], size[few], key[few])
    image[~few] = _permute_many(index[~few], size[~few], key[~few])
    return image


def _permute_few(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ranks the hashes. With one key no hash occurs twice, because SplitMix64's outputs are a permutation of its
    states.
    """
    values = np.arange(size.max(initial=1))
    hashes = splitmix64(key[:, None], values.astype(np.uint64))  # [n, largest size]
    own = np.take_along_axis(hashes, index[:, None], axis=1)
    return np.count_nonzero((hashes < own) & (values < size[:, None]), axis=1)


def _permute_many(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A Feistel network with cycle walking."""
    # frexp's exponent is the number of bits of an integer: the smallest power of two that holds every index.
    num_bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.uint64)
    image = _feistel(index.astype(np.uint64), num_bits, key)
    outside = np.flatnonzero(image >= size.astype(np.uint64))
    while outside.size:  # on average, each step moves at least half of them into the range
        image[outside] = _feistel(image[outside], num_bits[outside], key[outside])
        outside = outside[image[outside] >= size[outside].astype(np.uint64)]
    return image.astype(np.int64)


def _feistel(value: np.ndarray, num_bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of the numbers of ``num_bits`` bits; all uint64 [n].

    Each round changes one half of the bits by a function of the other: output ``half * NUM_ROUNDS + round`` of the
    SplitMix64 generator seeded with the key. The halves differ by one bit when ``num_bits`` is odd.
    """
    left_bits = num_bits >> np.uint64(1)
    right_bits = num_bits - left_bits
    left_mask = (np.uint64(1) << left_bits) - np.uint64(1)
    right_mask = (np.uint64(1) << right_bits) - np.uint64(1)
    left, right = value >> right_bits, value & right_mask
    rounds = np.uint64(NUM_ROUNDS)
    for number in range(0, NUM_ROUNDS, 2):
        right = right ^ (splitmix64(key, left * rounds + np.uint64(number)) & right_mask)
        left = left ^ (splitmix64(key, right * rounds + np.uint64(number + 1)) & left_mask)
    return (left << right_bits) | right
