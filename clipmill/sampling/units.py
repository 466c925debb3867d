"""Which samples a unit of a sample set holds.

A batch is ``sample.batch_size`` consecutive indices from a multiple of it on, and is always computed whole, so that
sample i never depends on ``sample.num_samples``. A unit holds the samples of one batch that were wanted and were not
there yet; its number is the index of its first sample. So a set has exactly ``num_samples`` samples, and raising that
adds units to those on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["Unit", "leading_units", "missing_units"]


class Unit(NamedTuple):
    """Consecutive samples of one batch."""

    first: int
    """Index of its first sample, and the number under which it is committed."""
    num_samples: int

    def __repr__(self) -> str:
        return f"{self.first:06d}"

    def batch(self, batch_size: int) -> range:
        """Indices of the whole batch that is computed for it."""
        start = self.first // batch_size * batch_size
        return range(start, start + batch_size)


def missing_units(num_samples: int, batch_size: int, committed: Mapping[int, int]) -> list[Unit]:
    """The units that complete a set of ``num_samples``, in order.

    Args:
        num_samples: wanted.
        batch_size: of the set.
        committed: number of samples of each committed unit, by its first sample.
    """
    missing: list[Unit] = []
    for start in range(0, num_samples, batch_size):
        end = min(start + batch_size, num_samples)
        held = [Unit(first, committed[first]) for first in range(start, end) if first in committed]
        missing += _gaps(start, end, held)
    return missing


def _gaps(start: int, end: int, held: list[Unit]) -> Iterator[Unit]:
    """What ascending units leave open between two indices."""
    position = start
    for unit in [*held, Unit(end, 0)]:
        if position < unit.first:
            yield Unit(position, unit.first - position)
        position = max(position, unit.first + unit.num_samples)


def leading_units(committed: Mapping[int, int]) -> list[int]:
    """The committed units that follow each other without a gap from sample 0 on: a data set can be made of them."""
    units, position = [], 0
    while position in committed:
        units.append(position)
        position += committed[position]
    return units
