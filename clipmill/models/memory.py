"""Batch sizes that fit the memory of a device."""

from __future__ import annotations

__all__ = ["MAX_BATCH", "largest_batch"]

MAX_BATCH = 256
MEMORY_SHARE = 0.8
"""Share of a GPU's memory that is used; the rest is for workspaces that grow with shapes."""


def largest_batch(total_bytes: int, bytes_of_one: int, bytes_of_two: int) -> int:
    """The largest power of two of items, up to `MAX_BATCH`, that fits a device's memory.

    Args:
        total_bytes: total memory of the device, not the free memory, so that all workers with the same GPU get the same
            result.
        bytes_of_one: peak memory while one item is computed, weights included.
        bytes_of_two: peak memory while two items are computed, weights included.
    """
    room = MEMORY_SHARE * total_bytes - bytes_of_one
    items = 1 + max(0, int(room // max(1, bytes_of_two - bytes_of_one)))
    return min(MAX_BATCH, 1 << (items.bit_length() - 1))
