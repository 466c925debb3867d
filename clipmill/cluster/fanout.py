"""Runs one function over many units of work on Ray actors that may die at any time.

The driver holds all state: which units wait (`queue`), what is known about the nodes (`nodes`), which actor has which
unit (`workers`). Actors hold none, so the loss of an actor costs at most its running unit. A unit must be safe to run
twice (the first commit wins), because Ray may report an actor dead that only lost its network and still works.

A node that is short of memory gets no units until it has enough again: its actors report free memory after each unit
and while they wait. If no unit runs anywhere, one is started despite low memory, to guarantee progress.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from clipmill.board import BOARD
from clipmill.cluster import connection
from clipmill.cluster.actor import Outcome
from clipmill.cluster.metrics import exporting
from clipmill.cluster.nodes import NodeWatch
from clipmill.cluster.queue import UnitQueue
from clipmill.cluster.workers import Worker, Workers
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, Interrupted, StageFailed

__all__ = ["fan_out"]

logger = logging.getLogger(__name__)

U = TypeVar("U")

WINDOW = 2
"""Maximum number of units per actor: the running one and the next, so that it never waits for the driver."""
SLOW_UNIT_SECONDS = 600
"""Seconds between two log lines about a unit that still runs. Ray has no time limit for tasks; only stages know one."""


def fan_out(
    make_worker: Callable[..., Callable[[U], dict[str, Any]]],
    arguments: tuple[Any, ...],
    units: Sequence[U],
    *,
    config: ClusterConfig,
    on_result: Callable[[U, dict[str, Any]], None],
    beside_cpus: int = 0,
) -> None:
    """Runs every unit once on the cluster, starting them in order as workers become free.

    Args:
        make_worker: runs once in each actor, ``make_worker(*arguments)``, and returns the function that does a unit.
        arguments: of make_worker; picklable, absolute URLs only.
        units: picklable; a unit may run twice.
        config: ``fanout_workers`` actors (never more than units) of ``fanout_cpus`` CPUs, and one GPU with ``use_gpu``.
        on_result: called in this process with each finished unit and its small dict, in order of completion. A dict
            ``work`` in it (clips, bytes, frames: see `clipmill.cluster.metrics.COUNTERS`) is counted and removed first.
        beside_cpus: CPUs of each actor in addition to ``fanout_cpus``, for threads that the function starts itself.

    A unit that raises is retried on a fresh actor, at most ``config.max_failures`` times, after the other units and if
    possible on another node. The death of its actor or node does not count as a failure, unless its actors die
    repeatedly. A node gets no more units if units fail there that succeed elsewhere.

    Raises:
        UserError: raised by a unit or a start, and on a second node too if there is one; or no node can hold a worker.
        Interrupted: SIGTERM or SIGINT. Finished units stay finished; running ones had ``config.drain_seconds``.
        StageFailed: a unit is out of attempts (the others were finished first), units fail on every node one after the
            other, or no worker can be started.
    """
    if not units:
        return
    with connection.connect(config), exporting(), connection.stop_signals() as stop:
        driver = _Driver(make_worker, arguments, units, config, on_result, beside_cpus)
        try:
            driver.run(stop)
        finally:
            driver.end()
    driver.raise_failures()


class _Driver(Generic[U]):
    """The loop of ``fan_out`` and its state."""

    def __init__(
        self,
        make_worker: Callable[..., Callable[[U], dict[str, Any]]],
        arguments: tuple[Any, ...],
        units: Sequence[U],
        config: ClusterConfig,
        on_result: Callable[[U, dict[str, Any]], None],
        beside_cpus: int,
    ) -> None:
        self._config = config
        self._units = units
        self._on_result = on_result
        self._nodes = NodeWatch()
        self._queue = UnitQueue(len(units), config.max_failures)
        self._workers = Workers(make_worker, arguments, config, self._nodes, beside_cpus)
        self._failures: dict[int, str] = {}
        self._raised_on: dict[int, set[str]] = {}
        """Units that raised a ClipmillError, and on which nodes."""
        self._mentioned: dict[int, float] = {}

    def run(self, stop: threading.Event) -> None:
        while self._queue.num_unfinished:
            if stop.is_set():
                self._drain()
                raise Interrupted(
                    f"stopped with {self._queue.num_unfinished} of {len(self._units)} units to do; "
                    "run the same command again"
                )
            self._workers.fill(self._queue.num_unfinished)
            self._hand_out()
            self._take_answers()
            self._workers.mention_unplaced()
            self._mention_slow_units()
            self._note()

    def _drain(self) -> None:
        """Waits for running units to finish, up to a limit."""
        seconds = connection.drain_seconds(self._config)[0]
        self._workers.ring(1)
        if seconds and any(worker.units for worker in self._workers.all):
            logger.warning("stopping: units that run get %.0f s to finish", seconds)
        deadline = time.monotonic() + seconds
        while any(worker.units for worker in self._workers.all) and time.monotonic() < deadline:
            self._take_answers()

    def _note(self) -> None:
        """Keeps the board up to date: what operators see of this fan-out."""
        at_work = self._workers.nodes_at_work()
        BOARD.note(
            units=f"{len(self._units) - self._queue.num_unfinished} of {len(self._units)} in this attempt",
            workers=sum(worker.is_started for worker in self._workers.all),
            nodes=len(at_work),
            sick_nodes=sorted(map(self._nodes.name, self._nodes.sick)),
        )

    def end(self) -> None:
        self._workers.end(connection.drain_seconds(self._config)[1])

    def raise_failures(self) -> None:
        if self._failures:
            unit = min(self._failures)
            raise StageFailed(
                f"{len(self._failures)} of {len(self._units)} units failed; unit {self._name(unit)} "
                f"{self._queue.attempts(unit)} times, at last: {self._failures[unit]}"
            )

    def _hand_out(self) -> None:
        now = time.monotonic()
        workers, places = self._workers, self._workers.places()
        ready = [worker for worker in workers.all if worker.is_started and not worker.is_spent]
        # Near the end, a second unit would wait behind a first one while other actors are idle.
        window = WINDOW if self._queue.num_waiting > len(workers.all) else 1
        for depth in range(window):
            for worker in ready:
                if len(worker.calls) == depth and not worker.is_short:
                    self._give(worker, places, now)
        self._watch_short([worker for worker in ready if worker.is_short and not worker.calls], places, now)

    def _give(self, worker: Worker, places: set[str], now: float) -> None:
        """Hands the next unit to an actor, if its node may run one."""
        node = worker.node
        if not self._nodes.may_work(node, self._workers.num_running(node), now):
            return
        trials = set() if self._nodes.is_suspect(node) else self._nodes.trials() | self._raised_on.keys()
        unit = self._queue.take(node, places - {node}, trials, now)
        if unit is not None:
            self._workers.give(worker, unit, self._units[unit])

    def _watch_short(self, idle: list[Worker], places: set[str], now: float) -> None:
        """Has idle actors on nodes short of memory report free memory; starts one unit there if no other unit runs."""
        if idle and not any(worker.units for worker in self._workers.all):
            self._give(max(idle, key=lambda worker: worker.free_share), places, now)
        for worker in idle:
            if self._queue.num_waiting and not worker.calls:
                self._workers.watch(worker)

    def _take_answers(self) -> None:
        for worker, unit, began, (kind, body) in self._workers.answers(connection.POLL_SECONDS):
            if kind == "done":
                self._take_result(worker, unit, body)
            elif kind == "returned":
                self._queue.put_back(unit)
            else:
                self._take_failure(worker, unit, began, (kind, body))
            if kind == "lost":
                self._drop_dead(worker)

    def _take_result(self, worker: Worker, unit: int, result: dict[str, Any]) -> None:
        num_sick = len(self._nodes.sick)
        self._queue.finish(unit)
        self._raised_on.pop(unit, None)
        self._nodes.succeeded(worker.node, unit, time.monotonic())
        if len(self._nodes.sick) > num_sick:
            for revived in self._queue.forgive(self._nodes.sick):
                del self._failures[revived]
        BOARD.add("units", 1, host := self._workers.cluster.host(worker.node))
        for name, amount in result.pop("work", {}).items():
            BOARD.add(name, amount, host)
        self._on_result(self._units[unit], result)

    def _take_failure(self, worker: Worker, unit: int, began: float, outcome: Outcome) -> None:
        kind, body = outcome
        now, node = time.monotonic(), worker.node
        error = connection.cluster_error(*body) if kind == "raised" else None
        cause = str(error) if error else connection.last_line(body)
        self._nodes.failed(node, unit, began, cause, now)
        BOARD.count("failures", cause)
        sick = self._nodes.sick
        if kind == "lost":
            again = self._queue.lose(unit, node, self._workers.cluster.ids() - sick, now)
        else:
            again = self._queue.fail(unit, node, sick, now)
        if error:
            tried = self._raised_on.setdefault(unit, set())
            tried.add(node)
            if not again or not self._workers.places() - tried:
                raise self._located(error, node)
        logger.warning(
            "unit %s %s on %s, attempt %d: %s",
            self._name(unit),
            "was lost" if kind == "lost" else "failed",
            self._nodes.name(node),
            self._queue.attempts(unit),
            cause if again or error else body,
            extra={"unit": self._name(unit)},
        )
        if again:
            BOARD.add("retries", 1, self._workers.cluster.host(node))
        else:
            self._failures[unit] = cause
        self._require_hope(cause)

    def _located(self, error: ClipmillError, node: str) -> ClipmillError:
        """The error, with the name of its node if there are several."""
        return type(error)(f"{error} (on {self._nodes.name(node)})") if len(self._workers.cluster.ids()) > 1 else error

    def _require_hope(self, cause: str) -> None:
        """Ends the stage when units fail on every node one after the other."""
        if self._nodes.is_hopeless(self._workers.cluster.ids(), self._workers.places()):
            raise StageFailed(
                f"units fail on every node one after the other, {self._queue.num_unfinished} of {len(self._units)} "
                f"are to do; at last: {cause}"
            )

    def _drop_dead(self, worker: Worker) -> None:
        """Forgets an actor that died; units it had not begun keep their places."""
        for unit in worker.units:
            self._queue.put_back(unit)
        self._workers.drop(worker)

    def _mention_slow_units(self) -> None:
        now = time.monotonic()
        for worker in self._workers.all:
            if worker.units and now - max(worker.began, self._mentioned.get(worker.units[0], 0)) > SLOW_UNIT_SECONDS:
                logger.warning(
                    "unit %s still runs on %s after %.0f s",
                    self._name(worker.units[0]),
                    self._nodes.name(worker.node),
                    now - worker.began,
                    extra={"unit": self._name(worker.units[0])},
                )
                self._mentioned[worker.units[0]] = now

    def _name(self, index: int) -> str:
        name = repr(self._units[index])
        return name if len(name) <= 120 else f"{name[:117]}..."
