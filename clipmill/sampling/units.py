"""Defines which samples a unit of a sample set holds.

A batch starts at a multiple of the batch size and is always computed whole, so that sample i never depends on
``sample.num_samples``. A unit holds the missing samples of one or a few batches; its number is the index of its first
sample. A set therefore has exactly ``num_samples`` samples, and raising the number adds units to those on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Unit", "leading_units", "missing_units", "samples_per_unit"]

_MOST_BATCHES = 4
"""Maximum number of batches in a unit; within a unit, a batch is decoded while the next one is drawn."""
_LEAST_UNITS = 8
"""Minimum number of units in a set before a unit holds more than one batch, so that workers can share the set."""


class Unit(NamedTuple):
    """Consecutive samples."""

    first: int
    """Index of its first sample, and the number under which it is committed."""
    num_samples: int

    def __repr__(self) -> str:
        return f"{self.first:06d}"

    def batches(self, batch_size: int) -> list[range]:
        """Indices of the whole batches that must be computed for the unit."""
        first = self.first // batch_size * batch_size
        starts = range(first, self.first + self.num_samples, batch_size)
        return [range(start, start + batch_size) for start in starts]


def samples_per_unit(num_samples: int, batch_size: int) -> int:
    """Number of samples in a full unit.

    Args:
        num_samples: samples in the set.
        batch_size: batch size of the set.
    """
    return batch_size * min(_MOST_BATCHES, max(1, num_samples // (_LEAST_UNITS * batch_size)))


def missing_units(num_samples: int, batch_size: int, committed: Mapping[int, int]) -> list[Unit]:
    """The units that complete a set of ``num_samples``, in order.

    Args:
        num_samples: wanted number of samples.
        batch_size: batch size of the set.
        committed: number of samples in each committed unit, by the index of its first sample.
    """
    size = samples_per_unit(num_samples, batch_size)
    missing: list[Unit] = []
    position = 0
    for first, count in [*sorted(committed.items()), (num_samples, 0)]:
        end = min(first, num_samples)
        while position < end:
            stop = min(end, position // size * size + size)
            missing.append(Unit(position, stop - position))
            position = stop
        position = max(position, first + count)
    return missing


def leading_units(committed: Mapping[int, int]) -> list[int]:
    """The committed units that cover the samples from 0 on without a gap; these can be frozen as a data set."""
    units, position = [], 0
    while position in committed:
        units.append(position)
        position += committed[position]
    return units
