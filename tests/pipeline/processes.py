"""A stage as a user starts it, and every process that comes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from clipmill.config import RunConfig

REPOSITORY = Path(__file__).parents[2]

_MARK = "CLIPMILL_TEST_JOB"
"""Every process of a job inherits this variable, wherever it is reparented to."""


class Job:
    """A stage, ``clipmill shard`` by default, in a process of its own.

    Attributes:
        driver: the process that was started.
        zombies: processes that had ended and were not waited for by a living parent, for as long as a second.
    """

    def __init__(self, config: RunConfig, *options: str, stage: str = "shard") -> None:
        self._mark = uuid.uuid4().hex
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
            # JSON is YAML. Only what the test set: the defaults of later stages need not fit its clips.
            file.write(config.model_dump_json(exclude_unset=True))
        self._config = Path(file.name)
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by __exit__
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.driver = psutil.Popen(
            [sys.executable, "-m", "clipmill.cli", stage, *options, "--config", str(self._config)],
            cwd=REPOSITORY,
            env={**environment, _MARK: self._mark},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self.zombies: set[psutil.Process] = set()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watcher.join()
        for process in [self.driver, *self.processes()]:
            if process.is_running():
                process.kill()
        self.driver.wait()
        self._output.close()
        self._config.unlink()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def wait(self, timeout_seconds: float) -> int:
        """Its exit status."""
        return int(self.driver.wait(timeout_seconds))

    def processes(self) -> list[psutil.Process]:
        """All living processes of the job but the driver."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process != self.driver:
                    found.append(process)
            except psutil.Error:  # ended meanwhile, a zombie, or not ours
                continue
        return found

    def leaked(self, patience_seconds: float) -> list[psutil.Process]:
        """What is still there when the driver is gone; Ray's processes take some seconds to notice."""
        deadline = time.monotonic() + patience_seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _watch(self) -> None:
        before: set[psutil.Process] = set()
        while not self._ended.wait(1.0):
            try:
                family = self.driver.children(recursive=True)
            except psutil.NoSuchProcess:
                return
            now = {process for process in family if _is_zombie(process)}
            self.zombies |= now & before
            before = now


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
