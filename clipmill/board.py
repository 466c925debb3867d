"""What the process that drives a stage knows about it: progress, workers, and failures by cause.

Drivers, `clipmill.progress.bar` and the fan-out write to the board. `clipmill.status` publishes it. There is one board
a process, as there is one root logger.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["BOARD", "Board", "Progress", "Snapshot"]

RATE_SECONDS = 120.0
"""The rate is that of the last two minutes, so that a stage that hangs soon shows no rate of better days."""
RATE_UPDATES = 10
"""Slow units: the rate is that of the last ten, however long they took."""
NUM_CAUSES = 5
"""The most frequent causes that a snapshot names; the others are counted together."""
MAX_CAUSES = 1000
"""Causes may name objects, so there may be as many as objects. Beyond this number they are counted together."""
OTHER_CAUSES = "other causes"

Kind = Literal["failures", "quarantine"]


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        done: amount of finished work, that of earlier attempts included.
        total: amount of all work; None while it is unknown.
        unit: plural name of what is counted.
        rate: units a second lately; None before anything can be said.
        eta_seconds: until all is done at this rate; None if nobody knows.
    """

    done: float
    total: float | None
    unit: str
    rate: float | None
    eta_seconds: float | None


@dataclass(frozen=True)
class Snapshot:
    """The board at one time.

    Attributes:
        progress: None before the first update.
        facts: of the newest progress (loss, clips, failed), and what was noted (workers, nodes).
        causes: of each kind (failed units, quarantined videos) the most frequent causes and how often each occurred.
    """

    progress: Progress | None
    facts: dict[str, Any]
    causes: dict[str, list[tuple[str, int]]]


@dataclass
class Board:
    """The board; safe to use from several threads.

    Attributes:
        stage: that runs; None: none.
        attempt: number of its lease.
    """

    stage: str | None = None
    attempt: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: float = 0.0
    _total: float | None = None
    _unit: str = ""
    _marks: deque[tuple[float, float]] = field(default_factory=deque)
    """(monotonic seconds, amount done), one for each second in which more was done."""
    _facts: dict[str, Any] = field(default_factory=dict)
    _causes: dict[str, Counter[str]] = field(default_factory=dict)

    def begin(self, stage: str, attempt: int) -> None:
        """Begins anew, with an attempt at a stage."""
        with self._lock:
            self.stage, self.attempt = stage, attempt
            self._marks.clear()
            self._done, self._unit = 0.0, ""
            self._facts, self._causes = {}, {}

    def advance(self, done: float, total: float | None, unit: str, facts: dict[str, Any]) -> None:
        """Sets how far the stage is, and the facts of this progress."""
        now = time.monotonic()
        with self._lock:
            if unit != self._unit or done < self._done:
                self._marks.clear()
            self._done, self._total, self._unit = done, total, unit
            self._facts |= facts
            if not self._marks or (done > self._marks[-1][1] and now - self._marks[-1][0] >= 1):
                self._marks.append((now, done))
            self._forget_old_marks(now)

    def note(self, **facts: Any) -> None:
        """Sets facts that no progress brings."""
        with self._lock:
            self._facts |= facts

    def count(self, kind: Kind, cause: str) -> None:
        """Counts one failure by its cause."""
        with self._lock:
            causes = self._causes.setdefault(kind, Counter())
            causes[cause if cause in causes or len(causes) < MAX_CAUSES else OTHER_CAUSES] += 1

    def snapshot(self) -> Snapshot:
        """What the board says now."""
        now = time.monotonic()
        with self._lock:
            causes = {kind: _most_frequent(counts) for kind, counts in self._causes.items()}
            return Snapshot(self._progress(now) if self._marks else None, dict(self._facts), causes)

    def _progress(self, now: float) -> Progress:
        self._forget_old_marks(now)
        since, before = self._marks[0]
        rate = (self._done - before) / (now - since) if now - since >= 1 else None
        left = None if self._total is None else max(0.0, self._total - self._done)
        eta_seconds = left / rate if rate and left is not None else None
        return Progress(self._done, self._total, self._unit, rate, eta_seconds)

    def _forget_old_marks(self, now: float) -> None:
        while len(self._marks) > RATE_UPDATES and now - self._marks[1][0] > RATE_SECONDS:
            self._marks.popleft()


def _most_frequent(counts: Counter[str]) -> list[tuple[str, int]]:
    named = [item for item in counts.most_common(NUM_CAUSES + 1) if item[0] != OTHER_CAUSES][:NUM_CAUSES]
    num_others = counts.total() - sum(number for _, number in named)
    return [*named, (OTHER_CAUSES, num_others)] if num_others else named


BOARD = Board()
