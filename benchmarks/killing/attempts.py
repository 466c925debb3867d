"""Runs a tool as processes that can be found and killed, whoever their parent has become."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Attempt", "Kill", "Outcome", "kill_schedule", "run", "run_killed"]

_MARK = "KILLS_ATTEMPT"
_POLL_SECONDS = 0.1
_WORKER_SECONDS = 30.0
_MAX_FAILURES = 5
"""A tool that fails or hangs more often after the kills is given up."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of the schedule.

    Attributes:
        fraction: when it comes: so much of the tool's undisturbed work after the kill before, counted from the end of
            the start-up where that kill took the driver.
        driver: kill the driver with all its processes, as a machine that loses power; else one worker that is busy.
        draw: which worker, in [0, 1).
    """

    fraction: float
    driver: bool
    draw: float


def kill_schedule(num_kills: int, seed: int) -> list[Kill]:
    """Half of the kills take the driver; their gaps add up to 0.8 of the undisturbed work, so that all find work."""
    draw = random.Random(seed)
    drivers = [number % 2 == 0 for number in range(num_kills)]
    draw.shuffle(drivers)
    gaps = [draw.uniform(0.5, 1.5) for _ in drivers]
    return [Kill(0.8 * gap / sum(gaps), driver, draw.random()) for gap, driver in zip(gaps, drivers, strict=True)]


class Attempt:
    """A command that runs, with all processes that descend from it."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self._mark = uuid.uuid4().hex  # inherited by every process, also by those whose parent died
        with log.open("ab") as output:
            self._driver = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment, _MARK: self._mark},
                start_new_session=True,
            )

    @property
    def status(self) -> int | None:
        """Exit status of the driver; None while it runs."""
        return self._driver.poll()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark:
                    found.append(process)
            except psutil.Error:  # gone, or not ours
                continue
        return found

    def kill_worker(self, pattern: str, draw: float) -> bool:
        """Kills one process whose command line matches; False where there is none."""
        workers = []
        for process in self.processes():
            try:
                if re.search(pattern, " ".join(process.cmdline())):
                    workers.append(process)
            except psutil.Error:
                continue
        if not workers:
            return False
        workers.sort(key=lambda process: process.pid)
        try:
            workers[int(draw * len(workers))].kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def kill_all(self) -> None:
        """Kills the driver and whatever it started, until nothing is left."""
        self._driver.kill()
        while processes := self.processes():
            for process in processes:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            time.sleep(_POLL_SECONDS)
        self._driver.wait()


@dataclass
class Outcome:
    """How a tool got through.

    Attributes:
        seconds: wall time, from the first start to the end of the last attempt.
        status: exit status of the last attempt; None where it had to be ended.
        starts: how often the command was started.
        landed: kills that found something to kill.
        failures: attempts that ended by themselves with another status than 0.
        hangs: attempts that had to be ended because nothing came of them.
    """

    seconds: float
    status: int | None
    starts: int = 1
    landed: int = 0
    failures: int = 0
    hangs: int = 0


def run(command: list[str], log: Path, environment: dict[str, str], limit_seconds: float) -> Outcome:
    """Runs a command to its end."""
    began = time.monotonic()
    attempt = Attempt(command, log, environment)
    try:
        _wait(attempt, limit_seconds)
        status = attempt.status
        return Outcome(time.monotonic() - began, status, hangs=int(status is None))
    finally:
        attempt.kill_all()


def run_killed(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    workers: str,
    schedule: list[Kill],
    startup_seconds: float,
    work_seconds: float,
) -> Outcome:
    """Runs a command, kills it by schedule, and starts it again until it ends with status 0.

    Args:
        command: what is started; started again, it continues.
        log: output of all attempts.
        environment: added to ours.
        workers: regular expression of the command lines of busy workers.
        schedule: the kills.
        startup_seconds: how long the tool starts before it works.
        work_seconds: how long it works, undisturbed.
    """
    began = time.monotonic()
    attempt = Attempt(command, log, environment)
    outcome = Outcome(0, None)

    def start_again() -> None:
        nonlocal attempt
        attempt.kill_all()
        attempt = Attempt(command, log, environment)
        outcome.starts += 1

    try:
        delay = startup_seconds
        for kill in schedule:
            delay += kill.fraction * work_seconds
            _wait(attempt, delay)
            if attempt.status not in (None, 0):  # it did not survive the kill before this one
                outcome.failures += 1
                start_again()
                _wait(attempt, startup_seconds + delay)
            if attempt.status is not None:
                continue
            if kill.driver:
                start_again()
                outcome.landed += 1
                delay = startup_seconds
            else:
                outcome.landed += _kill_worker(attempt, workers, kill.draw)
                delay = 0.0
        # Neither the kills nor a busy machine make the rest last this long.
        limit_seconds = 60 + 4 * (startup_seconds + work_seconds)
        _wait(attempt, limit_seconds)
        while attempt.status != 0 and outcome.failures + outcome.hangs < _MAX_FAILURES:
            outcome.hangs += attempt.status is None
            outcome.failures += attempt.status is not None
            start_again()
            _wait(attempt, limit_seconds)
        outcome.status = attempt.status
    finally:
        attempt.kill_all()
    outcome.seconds = time.monotonic() - began
    return outcome


def _kill_worker(attempt: Attempt, pattern: str, draw: float) -> bool:
    """Waits a little for a worker that is busy: one unit may just have ended; False where none appears."""
    deadline = time.monotonic() + _WORKER_SECONDS
    while attempt.status is None and time.monotonic() < deadline:
        if attempt.kill_worker(pattern, draw):
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _wait(attempt: Attempt, seconds: float) -> None:
    """Until the attempt ends, or for this long."""
    deadline = time.monotonic() + seconds
    while attempt.status is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
