"""The worker's half of a fan-out: an actor that does units, and the bell that ends them.

Ray kills an actor with SIGKILL, which leaves its temporary files behind. The driver therefore rings a bell first. A
thread of each actor waits for the bell, and then raises an exception in the main thread, so that the running unit
cleans up and ends. A worker that does not react in time is killed. If the driver dies, the bell dies with it, and the
actors react as if it had rung.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from clipmill.cluster import connection
from clipmill.cluster.memory import free_share
from clipmill.errors import ClipmillError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["Bell", "FanoutActor", "Outcome", "start_bell"]

Outcome = tuple[str, Any]
"""("done", dict), ("raised", (class name, message)) for a ClipmillError, ("failed", traceback text), or ("returned",
None) for a unit that was not begun or was given up."""

WATCH_SECONDS = 2.0
"""Seconds between two checks of free memory by an actor on a node that is short of it."""
MAX_LISTENERS = 100_000
"""Maximum number of actors waiting for one bell; Ray's default limit is 1,000 concurrent calls to an async actor."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Bell:
    """Actor on the driver's node. The first ring means "begin no more units", the second "give up the running unit"."""

    def __init__(self) -> None:
        self._rung = (asyncio.Event(), asyncio.Event())

    async def ring(self, times: int) -> None:
        """Rings until the total number of rings is ``times``."""
        for event in self._rung[:times]:
            event.set()

    async def wait(self, times: int) -> None:
        """Returns when it has rung ``times`` times."""
        await self._rung[times - 1].wait()


def start_bell() -> ActorHandle:
    """Starts the bell of one fan-out. It lives on the driver's node, so that the loss of another node does not end it.

    If its process dies, Ray restarts it and repeats the calls in which actors wait for a ring.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    bell = ray.remote(
        num_cpus=0,
        max_concurrency=MAX_LISTENERS,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    )(Bell)
    return bell.remote()


class _GivenUp(BaseException):
    """Raised in the middle of a unit. Not an `Exception`: code that reads broken files may catch those."""


class FanoutActor:
    """One worker process: builds the stage's worker once, then does one unit after the other."""

    def __init__(self, num_threads: int, bell: ActorHandle, environment: dict[str, str]) -> None:
        # Before start() imports the stage's modules: libraries read these variables when they are loaded.
        self._num_threads = num_threads
        os.environ.update(environment | dict.fromkeys(THREAD_VARIABLES, str(num_threads)))
        self._begins_units, self._is_busy, self._gives_up = True, False, False
        self._main_thread = threading.get_ident()
        self._on_sigterm_before = signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._listen, args=(bell,), name="bell", daemon=True).start()

    def place(self) -> str:
        """Returns the id of its node. The call returns as soon as the actor has its resources."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def start(self, make_worker: Callable[..., Callable[[Any], dict[str, Any]]], arguments: tuple[Any, ...]) -> Outcome:
        """Builds the function that does a unit."""

        def build() -> dict[str, Any]:
            self._work = make_worker(*arguments)
            return {}

        outcome = self._attempt(build)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._num_threads)
        return outcome

    def run(self, unit: Any) -> tuple[Outcome, float]:
        """Does one unit; returns its outcome, and the share of the node's memory that is free afterwards."""
        if not self._begins_units:
            return ("returned", None), free_share()
        outcome = self._attempt(lambda: self._work(unit))
        if outcome[0] != "done":
            self._begins_units = False  # the driver replaces this process, and would kill the next unit with it
        return outcome, free_share()

    def watch(self) -> float:
        """Waits a little, then returns the share of the node's memory that is free."""
        time.sleep(WATCH_SECONDS)
        return free_share()

    def _attempt(self, work: Callable[[], dict[str, Any]]) -> Outcome:
        """Exceptions become plain values: Ray would wrap them, and not all of them can be pickled."""
        try:
            self._is_busy = True
            try:
                if self._gives_up:  # the signal came just before, while no unit ran
                    raise _GivenUp
                return ("done", work())
            except ClipmillError as error:
                return ("raised", connection.error_facts(error))
            except Exception:
                return ("failed", traceback.format_exc())
            finally:
                self._is_busy = False
        except _GivenUp:
            return ("returned", None)

    def _listen(self, bell: ActorHandle) -> None:
        """Waits for the bell; runs in its own thread."""
        import ray

        try:
            ray.get(bell.wait.remote(1))
            self._begins_units = False
            ray.get(bell.wait.remote(2))
        except Exception:  # the driver died; Ray reports that with errors of several types
            self._begins_units = False
        self._gives_up = True
        signal.pthread_kill(self._main_thread, signal.SIGTERM)  # a real signal: it ends a blocking system call

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if not self._gives_up:  # from Ray, to end the process: its own handler does that properly
            if callable(self._on_sigterm_before):
                self._on_sigterm_before(number, frame)
        elif self._is_busy:
            self._is_busy = False  # once only: the cleanup must not be interrupted
            raise _GivenUp
