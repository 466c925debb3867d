"""The order of samples once more, one position at a time in plain integers: what order.py's text says, literally."""

from __future__ import annotations

from fractions import Fraction


def splitmix64(state: int, number: int) -> int:
    mixed = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def derive(seed: int, *numbers: int) -> int:
    key = seed % 2**64
    for number in numbers:
        key = splitmix64(key, number)
    return key


def permute(index: int, size: int, key: int) -> int:
    if size < 64:
        hashes = [splitmix64(key, value) for value in range(size)]
        return sorted(hashes).index(hashes[index])
    num_bits = (size - 1).bit_length()
    left_bits = num_bits // 2
    right_bits = num_bits - left_bits
    while True:
        left, right = index >> right_bits, index % 2**right_bits
        for number in range(8):
            if number % 2 == 0:
                right ^= splitmix64(key, left * 8 + number) % 2**right_bits
            else:
                left ^= splitmix64(key, right * 8 + number) % 2**left_bits
        index = (left << right_bits) + right
        if index < size:
            return index


def locate(position: int, counts: list[int], seed: int, num_streams: int, window: int) -> tuple[int, int]:
    epoch, index = divmod(position, sum(counts))
    offset, stream = divmod(index, num_streams)
    lengths = [max(0, -(-(sum(counts) - s) // num_streams)) for s in range(num_streams)]
    number, begin, end = 0, 0, window - stream * window // num_streams
    while offset >= end:
        number, begin, end = number + 1, end, end + window
    end = min(end, lengths[stream])
    place = sum(lengths[:stream]) + begin + permute(offset - begin, end - begin, derive(seed, 1, epoch, stream, number))
    for slot in range(len(counts)):
        shard = permute(slot, len(counts), derive(seed, 0, epoch))
        if place < counts[shard]:
            return shard, place
        place -= counts[shard]
    raise AssertionError("unreachable: places are below the number of samples")


def locate_mixed(
    position: int, counts: list[list[int]], slots: list[int], seed: int, streams: list[int], window: int
) -> tuple[int, int]:
    """Shards are numbered one data set after the other."""
    keys = [derive(seed, 2, part) for part in range(len(slots))]
    places = [
        (Fraction(ordinal * 2**32 + (keys[part] >> 32), slots[part]), part)
        for part in range(len(slots))
        for ordinal in range(slots[part])
    ]
    parts = [part for _, part in sorted(places)]
    block, slot = divmod(position, 1000)
    part = parts[slot]
    counter = block * slots[part] + parts[:slot].count(part)
    shard, row = locate(counter, counts[part], keys[part], streams[part], window)
    return sum(map(len, counts[:part])) + shard, row
