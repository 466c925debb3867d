"""Which units wait, until when, and for which node. No Ray in here; times are passed in.

Units are handed out in order. A failed unit goes to the back, pauses, and prefers a node on which it has not failed.

A failure is an exception of the unit; the unit is retried after up to ``max_failures`` of them. A loss is the end of
the worker that had the unit. A loss does not count if the worker's node is gone. If a worker is killed on a living
node, the unit may not be the cause, so it is given up only after several such losses.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Set
from dataclasses import dataclass, field

from clipmill.cluster.pauses import pause

__all__ = ["UnitQueue"]

MORE_LOSSES = 4
"""Losses allowed in addition to ``max_failures``, because Ray's memory monitor may kill a worker that is not at
fault."""
MAX_LOST_NODES = 20
"""A unit that was lost together with this number of nodes is given up, because it may have killed them."""


@dataclass
class _Trouble:
    """What went wrong with a unit so far: lists with the node of each event."""

    failures: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    ready_at: float = 0.0
    is_failed: bool = False

    @property
    def nodes(self) -> set[str]:
        return {*self.failures, *self.losses}


class UnitQueue:
    """The units of one fan-out by index.

    Args:
        num_units: units 0 to ``num_units - 1`` wait.
        max_failures: maximum number of failures after which a unit is still retried.

    Attributes:
        num_unfinished: units that are neither done nor given up.
    """

    def __init__(self, num_units: int, max_failures: int) -> None:
        self.num_unfinished = num_units
        self._max_failures = max_failures
        self._fresh = list(range(num_units))  # a sorted list is a heap
        self._again: dict[int, None] = {}  # in the order in which they failed
        self._troubles: dict[int, _Trouble] = {}

    @property
    def num_waiting(self) -> int:
        """Units that no worker has."""
        return len(self._fresh) + len(self._again)

    def take(self, node: str, others: Collection[str], trials: Set[int], now: float) -> int | None:
        """Removes the next unit for a node.

        Args:
            node: where it will run.
            others: other nodes that work or may soon work; a unit that failed on ``node`` waits for one of them.
            trials: units that take precedence on nodes where they have not failed.
            now: monotonic seconds.
        """
        for unit in self._again:
            if unit in trials and self._is_ready(unit, now) and node not in self._troubles[unit].nodes:
                del self._again[unit]
                return unit
        if self._fresh:
            return heapq.heappop(self._fresh)
        for unit in self._again:
            if not self._is_ready(unit, now):
                continue
            nodes = self._troubles[unit].nodes
            if node not in nodes or nodes.issuperset(others):
                del self._again[unit]
                return unit
        return None

    def put_back(self, unit: int) -> None:
        """Returns a unit that was taken but not begun; it keeps its place."""
        if unit in self._troubles:
            self._again = {unit: None, **self._again}
        else:
            heapq.heappush(self._fresh, unit)

    def finish(self, unit: int) -> None:
        """Notes that a unit is done."""
        self.num_unfinished -= 1

    def fail(self, unit: int, node: str, sick: Set[str], now: float) -> bool:
        """Notes that a unit failed on a node; returns whether it will be retried."""
        trouble = self._troubles.setdefault(unit, _Trouble())
        trouble.failures.append(node)
        trouble.is_failed = self._has_failed(trouble, sick)
        return self._try_again(unit, trouble.is_failed, now)

    def lose(self, unit: int, node: str, alive: Collection[str], now: float) -> bool:
        """Notes that the worker that had a unit ended; returns whether the unit will be retried.

        Args:
            unit: the unit.
            node: where it ran.
            alive: the living nodes that are not sick. Earlier losses are judged again by them, because Ray notices late
                that a node is gone.
            now: monotonic seconds.
        """
        trouble = self._troubles.setdefault(unit, _Trouble())
        trouble.losses.append(node)
        num_killed = sum(node in alive for node in trouble.losses)
        is_over = num_killed > self._max_failures + MORE_LOSSES or len(trouble.losses) > MAX_LOST_NODES
        return self._try_again(unit, is_over, now)

    def attempts(self, unit: int) -> int:
        """Failures and losses of a unit so far."""
        trouble = self._troubles[unit]
        return len(trouble.failures) + len(trouble.losses)

    def forgive(self, sick: Set[str]) -> list[int]:
        """Forgets failures on sick nodes; returns the units that were given up and now wait again."""
        revived = []
        for unit, trouble in self._troubles.items():
            if trouble.is_failed and not self._has_failed(trouble, sick):
                trouble.is_failed = False
                self.num_unfinished += 1
                self._again[unit] = None
                revived.append(unit)
        return revived

    def _has_failed(self, trouble: _Trouble, sick: Set[str]) -> bool:
        return sum(node not in sick for node in trouble.failures) > self._max_failures

    def _try_again(self, unit: int, is_over: bool, now: float) -> bool:
        if is_over:
            self.num_unfinished -= 1
            return False
        self._troubles[unit].ready_at = now + pause(self.attempts(unit))
        self._again[unit] = None
        return True

    def _is_ready(self, unit: int, now: float) -> bool:
        return now >= self._troubles[unit].ready_at
