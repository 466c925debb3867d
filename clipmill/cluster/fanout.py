"""Runs one function over many units of work on Ray actors that may die at any time.

The driver holds all state: which units wait, which actor has which, how often each was tried. An actor is a place
to run and nothing else, so losing one loses at most its running unit. A unit's result must be safe to produce twice
(first commit wins): a cut network makes Ray report an actor dead that still works.

A node that is short of memory gets no more units until it has some again: its actors say after each unit how much is
left, and while they wait. Only where no unit runs anywhere one is handed out nevertheless, so that the work always goes
on.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from clipmill.cluster import connection
from clipmill.cluster.memory import free_share
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, Interrupted, StageFailed

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

__all__ = ["fan_out"]

logger = logging.getLogger(__name__)

U = TypeVar("U")
Outcome = tuple[str, Any]
"""("done", dict), ("raised", (class name, message)) for a ClipmillError, or ("failed", traceback text)."""

MIN_FREE_SHARE = 0.1
"""Of a node's memory. Ray kills workers at 5 %, whichever video happens to be in them."""
WATCH_SECONDS = 2.0
"""How often an actor of a node that is short of memory looks again."""
WINDOW = 2
"""Units an actor holds: the one it works on, and the next, so that it never waits for the driver."""
SLOW_UNIT_SECONDS = 600
"""How often a unit that still runs is mentioned: Ray has no time limit for a task, and only stages can know one."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class FanoutActor:
    """One worker process: builds the stage's worker once, then does one unit after the other."""

    def __init__(self, num_threads: int) -> None:
        # Before the stage's modules arrive with start(): libraries read these when they are loaded.
        self._num_threads = num_threads
        os.environ.update(connection.WORKER_ENVIRONMENT | dict.fromkeys(THREAD_VARIABLES, str(num_threads)))

    def place(self) -> None:
        """Returns as soon as the actor has been given its resources."""

    def start(self, make_worker: Callable[..., Callable[[Any], dict[str, Any]]], arguments: tuple[Any, ...]) -> Outcome:
        """Builds the function that does a unit."""

        def build() -> dict[str, Any]:
            self._work = make_worker(*arguments)
            return {}

        outcome = _attempt(build)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._num_threads)
        return outcome

    def run(self, unit: Any) -> tuple[Outcome, float]:
        """Does one unit; with it comes the share of the node's memory that is free afterwards."""
        return _attempt(lambda: self._work(unit)), free_share()

    def watch(self) -> float:
        """The share of the node's memory that is free a little later."""
        time.sleep(WATCH_SECONDS)
        return free_share()


def _attempt(work: Callable[[], dict[str, Any]]) -> Outcome:
    """Exceptions become plain values: Ray would wrap them, and not all of them can be pickled."""
    try:
        return ("done", work())
    except ClipmillError as error:
        return ("raised", (type(error).__name__, str(error)))
    except Exception:
        return ("failed", traceback.format_exc())


def fan_out(
    make_worker: Callable[..., Callable[[U], dict[str, Any]]],
    arguments: tuple[Any, ...],
    units: Sequence[U],
    *,
    config: ClusterConfig,
    on_result: Callable[[U, dict[str, Any]], None],
) -> None:
    """Does every unit once on the cluster, in order of the sequence as far as workers are free.

    Args:
        make_worker: runs once in each actor, ``make_worker(*arguments)``, and returns the function that does a unit.
        arguments: of make_worker; picklable, absolute URLs only.
        units: picklable; the function must bear to do one twice.
        config: ``fanout_workers`` actors (never more than units) of ``fanout_cpus`` CPUs, and one GPU with ``use_gpu``.
        on_result: called here with each finished unit and its small dict, in order of completion.

    A unit that raises or whose actor dies is tried again on a fresh actor, at most ``config.max_failures`` times.

    Raises:
        UserError: raised by a unit (not tried again), or no node can hold a worker.
        Interrupted: SIGTERM or SIGINT; finished units stay finished.
        StageFailed: a unit is out of attempts (the others were finished first), or no worker can be started.
    """
    if not units:
        return
    with connection.connect(config), connection.stop_signals() as stop:
        driver = _Driver(make_worker, arguments, units, config, on_result)
        try:
            driver.run(stop)
        finally:
            driver.kill_actors()
    driver.raise_failures()


@dataclass(eq=False)
class _Slot:
    """An actor and the calls it still owes us, in the order in which it answers them."""

    actor: ActorHandle
    calls: deque[tuple[ObjectRef, int | None]]
    """(call, index of its unit); None: not a unit but ``place``, ``start`` or ``watch``."""
    created: float = field(default_factory=time.monotonic)
    answered: float = field(default_factory=time.monotonic)
    placed: bool = False
    started: bool = False
    free_share: float = 1.0
    """Of its node's memory, when it last said so."""

    @property
    def is_short(self) -> bool:
        """Whether its node has too little memory left for another unit."""
        return self.free_share < MIN_FREE_SHARE


class _Driver(Generic[U]):
    """The loop of ``fan_out`` and its state."""

    def __init__(
        self,
        make_worker: Callable[..., Callable[[U], dict[str, Any]]],
        arguments: tuple[Any, ...],
        units: Sequence[U],
        config: ClusterConfig,
        on_result: Callable[[U, dict[str, Any]], None],
    ) -> None:
        import ray

        self._config = config
        self._units = units
        self._on_result = on_result
        self._bundle = {"CPU": float(config.fanout_cpus), "GPU": 1.0 if config.use_gpu else 0.0}
        connection.require_capacity(config, self._bundle, 1, waited_seconds=0)
        # Once into the object store instead of once an actor: arguments may hold a model's weights.
        self._worker = (ray.put(make_worker), ray.put(arguments))
        self._actor_class = ray.remote(
            num_cpus=self._bundle["CPU"], num_gpus=self._bundle["GPU"], max_restarts=0, max_task_retries=0
        )(FanoutActor)
        self._waiting = deque(range(len(units)))
        self._unfinished = len(units)
        self._attempts = [0] * len(units)
        self._failures: list[tuple[int, str]] = []
        self._failed_starts = 0
        self._slots: list[_Slot] = []
        self._next_warning = time.monotonic() + connection.WAIT_WARNING_SECONDS

    def run(self, stop: threading.Event) -> None:
        import ray

        while self._unfinished:
            if stop.is_set():
                raise Interrupted(
                    f"stopped with {self._unfinished} of {len(self._units)} units to do; run the same command again"
                )
            self._start_actors()
            self._hand_out()
            heads = {slot.calls[0][0]: slot for slot in self._slots if slot.calls}
            ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0) if heads else ([], [])
            if not ready and heads:
                ready, _ = ray.wait(list(heads), num_returns=1, timeout=connection.POLL_SECONDS)
            for call in ready:
                self._take(heads[call])
            self._mention_waiting()

    def kill_actors(self) -> None:
        for slot in list(self._slots):
            self._drop(slot)

    def raise_failures(self) -> None:
        if self._failures:
            index, line = min(self._failures)
            raise StageFailed(
                f"{len(self._failures)} of {len(self._units)} units failed; unit {self._name(index)} "
                f"{self._attempts[index]} times, at last: {line}"
            )

    def _start_actors(self) -> None:
        num_workers = self._config.fanout_workers or max(1, connection.num_bundles(self._bundle))
        while len(self._slots) < min(num_workers, self._unfinished):
            actor = self._actor_class.remote(self._config.fanout_cpus)
            self._slots.append(_Slot(actor, deque([(actor.place.remote(), None)])))

    def _hand_out(self) -> None:
        # Near the end a second unit would wait behind a first one while other actors have nothing to do.
        window = WINDOW if len(self._waiting) > len(self._slots) else 1
        for depth in range(window):
            for slot in self._slots:
                if self._waiting and slot.started and len(slot.calls) == depth and not slot.is_short:
                    self._give(slot)
        self._watch_short()

    def _give(self, slot: _Slot) -> None:
        """Hands the next unit to an actor."""
        index = self._waiting.popleft()
        if not slot.calls:
            slot.answered = time.monotonic()
        slot.calls.append((slot.actor.run.remote(self._units[index]), index))

    def _watch_short(self) -> None:
        """Idle actors of nodes short of memory tell when there is more; one of them works if nobody else does."""
        idle = [slot for slot in self._slots if slot.started and slot.is_short and not slot.calls]
        runs = any(index is not None for slot in self._slots for _, index in slot.calls)
        if idle and self._waiting and not runs:
            slot = max(idle, key=lambda slot: slot.free_share)
            idle.remove(slot)
            self._give(slot)
        for slot in idle:
            if self._waiting:
                slot.calls.append((slot.actor.watch.remote(), None))

    def _take(self, slot: _Slot) -> None:
        """Reads the answer to the oldest call of an actor."""
        import ray

        call, index = slot.calls.popleft()
        slot.answered = time.monotonic()
        try:
            answer = ray.get(call)
        except ray.exceptions.RayError as error:  # the actor or its node died, or the arguments do not unpickle
            lost = ("failed", connection.death(error) if connection.is_death(error) else str(error))
            answer = lost if index is None else (lost, slot.free_share)
        if not slot.placed:
            self._take_place(slot, answer)
        elif not slot.started:
            self._take_start(slot, answer)
        elif index is None:
            self._take_watch(slot, answer)
        else:
            outcome, slot.free_share = answer
            self._take_unit(slot, index, outcome)

    def _take_watch(self, slot: _Slot, answer: float | Outcome) -> None:
        if isinstance(answer, float):
            slot.free_share = answer
        else:
            self._drop(slot)  # it died, with nothing in its hands

    def _take_place(self, slot: _Slot, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._lose_start(slot, outcome[1])
            return
        slot.placed = True
        slot.calls.append((slot.actor.start.remote(*self._worker), None))

    def _take_start(self, slot: _Slot, outcome: Outcome) -> None:
        kind, body = outcome
        if kind == "raised":
            raise connection.cluster_error(*body)
        if kind == "failed":
            self._lose_start(slot, body)
            return
        slot.started = True
        self._failed_starts = 0

    def _lose_start(self, slot: _Slot, reason: str) -> None:
        self._drop(slot)
        self._failed_starts += 1
        logger.warning("a worker could not start (%d in a row): %s", self._failed_starts, connection.last_line(reason))
        if self._failed_starts > self._config.max_failures:
            raise StageFailed(f"no worker can start, at last: {connection.last_line(reason)}")

    def _take_unit(self, slot: _Slot, index: int, outcome: Outcome) -> None:
        kind, body = outcome
        if kind == "done":
            self._unfinished -= 1
            self._on_result(self._units[index], body)
        elif kind == "raised":
            raise connection.cluster_error(*body)
        else:
            self._drop(slot)  # before the unit goes back: it comes first again
            self._lose_unit(index, body)

    def _lose_unit(self, index: int, reason: str) -> None:
        self._attempts[index] += 1
        line = connection.last_line(reason)
        again = self._attempts[index] <= self._config.max_failures
        logger.warning(
            "unit %s failed, attempt %d of %d: %s",
            self._name(index),
            self._attempts[index],
            self._config.max_failures + 1,
            line if again else reason,
        )
        if again:
            self._waiting.appendleft(index)
        else:
            self._unfinished -= 1
            self._failures.append((index, line))

    def _drop(self, slot: _Slot) -> None:
        """Ends an actor; units it had not come to are no failures of theirs."""
        import ray

        self._slots.remove(slot)
        ray.kill(slot.actor)
        self._waiting.extendleft(index for _, index in reversed(slot.calls) if index is not None)

    def _mention_waiting(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.calls and slot.calls[0][1] is not None and now - slot.answered > SLOW_UNIT_SECONDS:
                logger.warning("unit %s still runs after %d s", self._name(slot.calls[0][1]), SLOW_UNIT_SECONDS)
                slot.answered = now
        unplaced = [slot for slot in self._slots if not slot.placed]
        if not unplaced or now < self._next_warning:
            return
        self._next_warning = now + connection.WAIT_WARNING_SECONDS
        waited_seconds = now - min(slot.created for slot in unplaced)
        if waited_seconds >= connection.WAIT_WARNING_SECONDS:
            if len(unplaced) == len(self._slots):
                connection.require_capacity(self._config, self._bundle, 1, waited_seconds)
            logger.warning("fan-out: %s", connection.waiting_message(self._bundle, len(unplaced), waited_seconds))

    def _name(self, index: int) -> str:
        name = repr(self._units[index])
        return name if len(name) <= 120 else f"{name[:117]}..."
