"""Requests room for more training workers continuously, and reports when there is enough to grow.

Each missing worker is a separate placement group. The cluster's autoscaler therefore sees the demand, and a node that
other jobs use does not count as free.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

__all__ = ["Growth"]

SETTLE_SECONDS = 20.0
"""Time to wait before growing: nodes often return one after the other, and growing once is cheaper than twice."""


class Growth:
    """Reservations in addition to a running group, released at the end of the ``with`` block.

    Args:
        bundle: resources of one worker.
        num_workers: of the group.
        sizes: numbers of workers that the training may have, ascending.
    """

    def __init__(self, bundle: dict[str, float], num_workers: int, sizes: list[int]) -> None:
        self._bundle = {name: amount for name, amount in bundle.items() if amount}
        self._num_workers, self._sizes = num_workers, sizes
        self._reservations: list[Any] = []
        self._ready_since: float | None = None

    def __enter__(self) -> Growth:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from ray.util import remove_placement_group

        for reservation in self._reservations:
            remove_placement_group(reservation)

    def is_ready(self) -> bool:
        """Whether a larger group would fit. It reserves resources, so call it only once the group is placed."""
        from ray.util import placement_group, placement_group_table

        missing = self._sizes[-1] - self._num_workers
        if missing > 0 and not self._reservations:
            self._reservations = [placement_group([self._bundle]) for _ in range(missing)]
        states = [placement_group_table(reservation)["state"] for reservation in self._reservations]
        num_ready = states.count("CREATED")
        if not any(self._num_workers < size <= self._num_workers + num_ready for size in self._sizes):
            self._ready_since = None
            return False
        self._ready_since = self._ready_since or time.monotonic()
        return num_ready == len(states) or time.monotonic() - self._ready_since >= SETTLE_SECONDS
