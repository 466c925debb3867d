"""Progress display: a bar with rate and ETA on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clipmill.board import BOARD

__all__ = ["bar", "duration"]

LINE_SECONDS = 10.0
"""Seconds between two log lines when the output is not a terminal."""

logger = logging.getLogger(__name__)


class bar:  # noqa: N801
    """``with bar("shard", total=240, unit="videos") as progress: progress.update(17, failed=1)``.

    Args:
        title: name of the work, shown before the bar.
        total: amount of work in ``unit``; None while it is unknown.
        unit: plural name of what is counted.
    """

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._console = Console(stderr=True)
        self._rich: Progress | None = None
        self._first: float | None = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> bar:
        if self._console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{self._unit}  {{task.fields[rate]}}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
            )
            self._task = self._rich.add_task(self._title, total=self._total, facts="", rate="")
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def update(self, done: float, total: float | None = None, **facts: float | str) -> None:
        """Shows that ``done`` of ``total`` units are finished, and further facts (loss, failures)."""
        if total is not None:
            self._total = total
        BOARD.advance(done, self._total, self._unit, facts)
        if self._first is None:  # work of an earlier run must not count towards this run's rate
            self._first, self._began = done, time.monotonic()
        seconds = time.monotonic() - self._began
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        shown = "  ".join(f"{name} {_short(value)}" for name, value in facts.items())
        if self._rich is not None:
            self._rich.update(
                self._task, completed=done, total=self._total, facts=shown, rate=f"{_short(rate)}/s" if rate else ""
            )
            return
        now = time.monotonic()
        finished = self._total is not None and done >= self._total
        if now - self._last_line >= LINE_SECONDS or finished:
            self._last_line = now
            of_total = f"/{self._total:g}" if self._total is not None else ""
            eta = (
                f", ETA {duration((self._total - done) / rate)}"
                if self._total is not None and rate and not finished
                else ""
            )
            line = f"{self._title}: {done:g}{of_total} {self._unit}, {_short(rate)}/s{eta}  {shown}"
            logger.info("%s", line.rstrip())


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Formats seconds: ``4.2 s``, ``12 min``, ``5 h 12 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
