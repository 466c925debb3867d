"""Exports the state of a stage as Ray metrics, which each node's agent offers to Prometheus beside Ray's own.

Only the driver exports, because it knows everything (`clipmill.board`): a node is a label, not a source. A stage
without Ray has no metrics, but still has its status and summary.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from clipmill import storage
from clipmill.board import BOARD, Board

__all__ = ["COUNTERS", "GAUGES", "PREFIX", "exporting"]

PREFIX = "clipmill_"
"""Prefix of each name; Prometheus sees ``ray_clipmill_...``."""
EVERY_SECONDS = 2.0
"""Ray collects every 10 s unless RAY_metrics_report_interval_ms says otherwise."""


class Metric(NamedTuple):
    """One metric. All metrics have the labels ``stage`` and ``run``."""

    description: str
    label: str | None = None


COUNTERS = {
    "units": Metric("Units of work that were finished, by the node that did them.", "node"),
    "clips": Metric("Clips that were made, encoded, drawn or measured.", "node"),
    "bytes": Metric("Bytes of shards that were made.", "node"),
    "frames": Metric("Frames that were decoded.", "node"),
    "gpu_wait_seconds": Metric("Time in which models waited for decoded clips.", "node"),
    "retries": Metric("Units that are tried again, by the node where they failed or were lost.", "node"),
    "failures": Metric("Failures of units, by cause.", "cause"),
    "quarantine": Metric("Videos that were excluded, by cause.", "cause"),
}
"""Amounts of `Board.add`; the exported names end with ``_total``."""
GAUGES = {
    "progress": Metric("Finished work, in the stage's own unit: videos, clips, steps."),
    "progress_of": Metric("All work, in the same unit."),
    "eta_seconds": Metric("Time until all is done, at the rate of the last minutes."),
    "workers": Metric("Workers that have started."),
    "nodes": Metric("Nodes with such workers."),
    "sick_nodes": Metric("Nodes that get no more units."),
    "loss": Metric("Training loss, as the log shows it."),
    "clips_per_second": Metric("Clips that a training goes through."),
    "tokens_per_second": Metric("Tokens that a training goes through."),
    "data_wait_share": Metric("Share of a training's time in which it waited for data."),
    "mfu": Metric("Share of the peak FLOP/s that a training reaches."),
}
"""Gauges; each stage sets those that it knows."""


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Exports the board during the block; needs an open connection to Ray."""
    exporter = _Exporter(BOARD)
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(EVERY_SECONDS):
            exporter.export()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        exporter.export()


class _Exporter:
    def __init__(self, board: Board) -> None:
        from ray.util.metrics import Counter, Gauge

        self._board = board
        self._sent: dict[tuple[str, str], float] = dict(board.totals())  # of an earlier block
        self._counters = {
            name: Counter(f"{PREFIX}{name}_total", metric.description, _tags(metric))
            for name, metric in COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(f"{PREFIX}{name}", metric.description, _tags(metric)) for name, metric in GAUGES.items()
        }

    def export(self) -> None:
        """Passes new amounts and values to Ray."""
        board = self._board
        common = {"stage": board.stage or "none", "run": storage.shown(board.run or "none")}
        for (name, label), amount in board.totals().items():
            more = amount - self._sent.get((name, label), 0.0)
            if more > 0:
                self._sent[name, label] = amount
                tag = COUNTERS[name].label
                self._counters[name].inc(more, common | ({tag: storage.redacted(label)} if tag else {}))
        for name, value in _facts(board).items():
            self._gauges[name].set(value, common)


def _tags(metric: Metric) -> tuple[str, ...]:
    return ("stage", "run", metric.label) if metric.label else ("stage", "run")


def _facts(board: Board) -> dict[str, float]:
    """Values of the gauges that the board knows."""
    snapshot = board.snapshot()
    facts: dict[str, Any] = dict(snapshot.facts)
    facts["sick_nodes"] = len(facts.get("sick_nodes", ()))
    if snapshot.progress is not None:
        facts |= {
            "progress": snapshot.progress.done,
            "progress_of": snapshot.progress.total,
            "eta_seconds": snapshot.progress.eta_seconds,
        }
    return {name: float(facts[name]) for name in GAUGES if isinstance(facts.get(name), int | float)}
