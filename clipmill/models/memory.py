"""How much fits a device."""

from __future__ import annotations

__all__ = ["MAX_BATCH", "largest_batch"]

MAX_BATCH = 256
MEMORY_SHARE = 0.8
"""Of a GPU's memory; the rest is for workspaces that grow with shapes."""


def largest_batch(total_bytes: int, bytes_of_one: int, bytes_of_two: int) -> int:
    """The largest power of two of items, up to `MAX_BATCH`, that a device's memory holds.

    Args:
        total_bytes: of the device. Not of what is free now: a worker on the same kind of GPU finds the same number.
        bytes_of_one: peak while one item is computed, with the weights.
        bytes_of_two: the same of two items.
    """
    room = MEMORY_SHARE * total_bytes - bytes_of_one
    items = 1 + max(0, int(room // max(1, bytes_of_two - bytes_of_one)))
    return min(MAX_BATCH, 1 << (items.bit_length() - 1))
