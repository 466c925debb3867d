"""The state of a stage in its driver process: progress, workers, and failures by cause.

Drivers, `clipmill.progress.bar` and the fan-out write to the board, and `clipmill.status` publishes it. Like the root
logger, each process has one board.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["BOARD", "Board", "Progress", "Snapshot"]

RATE_SECONDS = 120.0
"""The rate covers the last two minutes, so that it soon drops when a stage hangs."""
RATE_UPDATES = 10
"""The rate covers at least the last ten updates, even if they took longer than `RATE_SECONDS`."""
NUM_CAUSES = 5
"""A snapshot names this number of most frequent causes, and counts the others together."""
MAX_CAUSES = 1000
"""Maximum number of distinct causes. Causes may name objects, so further ones are counted together."""
OTHER_CAUSES = "other causes"
MAX_LABELS = 30
"""Maximum number of causes per kind in metrics: Prometheus keeps a time series for each."""

Kind = Literal["failures", "quarantine"]


@dataclass(frozen=True)
class Progress:
    """Progress of a stage.

    Attributes:
        done: amount of finished work, including that of earlier attempts.
        total: amount of all work; None while it is unknown.
        unit: plural name of what is counted.
        rate: recent rate in units a second; None until it can be estimated.
        eta_seconds: time until all is done at this rate; None while it is unknown.
    """

    done: float
    total: float | None
    unit: str
    rate: float | None
    eta_seconds: float | None


@dataclass(frozen=True)
class Snapshot:
    """State of the board at one time.

    Attributes:
        progress: None before the first update.
        facts: facts of the newest progress (loss, clips, failed) and of `Board.note` (workers, nodes).
        causes: by kind (failed units, quarantined videos), the most frequent causes and how often each occurred.
    """

    progress: Progress | None
    facts: dict[str, Any]
    causes: dict[str, list[tuple[str, int]]]


@dataclass
class Board:
    """The board; safe to use from several threads.

    Attributes:
        stage: the running stage; None while no stage runs.
        attempt: number of its lease.
        run: root of the run.
    """

    stage: str | None = None
    attempt: int | None = None
    run: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: float = 0.0
    _total: float | None = None
    _unit: str = ""
    _marks: deque[tuple[float, float]] = field(default_factory=deque)
    """(monotonic seconds, amount done), one for each second in which more was done."""
    _facts: dict[str, Any] = field(default_factory=dict)
    _causes: dict[str, Counter[str]] = field(default_factory=dict)
    _totals: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    _began: float = field(default_factory=time.monotonic)
    _earlier_seconds: float = 0.0

    def begin(self, stage: str, attempt: int, run: str | None = None, earlier_seconds: float = 0.0) -> None:
        """Clears the board for a new attempt at a stage; earlier attempts took ``earlier_seconds`` in all.

        Totals are kept: they count since the process began.
        """
        with self._lock:
            self.stage, self.attempt, self.run = stage, attempt, run
            self._began, self._earlier_seconds = time.monotonic(), earlier_seconds
            self._marks.clear()
            self._done, self._unit = 0.0, ""
            self._facts, self._causes = {}, {}

    @property
    def seconds(self) -> float:
        """Seconds that the stage has taken so far, including its earlier attempts."""
        return self._earlier_seconds + time.monotonic() - self._began

    def advance(self, done: float, total: float | None, unit: str, facts: dict[str, Any]) -> None:
        """Sets the stage's progress and its facts."""
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
        """Sets facts that do not belong to the progress."""
        with self._lock:
            self._facts |= facts

    def count(self, kind: Kind, cause: str) -> None:
        """Counts one failure by its cause."""
        with self._lock:
            causes = self._causes.setdefault(kind, Counter())
            causes[cause if cause in causes or len(causes) < MAX_CAUSES else OTHER_CAUSES] += 1
            label, num_labels = kind_of_cause(cause), sum(name == kind for name, _ in self._totals)
            self._totals[kind, label if (kind, label) in self._totals or num_labels < MAX_LABELS else OTHER_CAUSES] += 1

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Adds to a total.

        Args:
            name: name of a counter of `clipmill.cluster.metrics`.
            amount: at least 0.
            label: value of the metric's label, such as the host that did the work.
        """
        with self._lock:
            self._totals[name, label] += amount

    def totals(self) -> dict[tuple[str, str], float]:
        """Amounts by name and label since the process began."""
        with self._lock:
            return dict(self._totals)

    def snapshot(self) -> Snapshot:
        """The current state of the board."""
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


def kind_of_cause(cause: str) -> str:
    """A cause without details of one object: without names, numbers, and all text after the first sentence."""
    line = cause.strip().splitlines()[0] if cause.strip() else "unknown"
    words = [word if word.isascii() and not re.search(r"[\d/\\'\"]", word) else "..." for word in line.split()]
    return re.sub(r"(\.\.\.[ ,;:]*)+", "... ", " ".join(words)).strip()[:80]


def _most_frequent(counts: Counter[str]) -> list[tuple[str, int]]:
    named = [item for item in counts.most_common(NUM_CAUSES + 1) if item[0] != OTHER_CAUSES][:NUM_CAUSES]
    num_others = counts.total() - sum(number for _, number in named)
    return [*named, (OTHER_CAUSES, num_others)] if num_others else named


BOARD = Board()
