"""Hosts come and go while a fan-out runs, with the settings that nobody has touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import HEALTH_CHECKS, Hosts, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 120
"""On a busy machine. docs/cluster.md says what was measured on an idle one."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    cluster = Hosts(1, **HEALTH_CHECKS)
    try:
        yield cluster
    finally:
        cluster.stop()


class Driver:
    """A fan-out that notes the node of each unit."""

    def __init__(self, hosts: Hosts, folder: Path, num_units: int) -> None:
        self._notes, self._log = folder / "nodes", folder / "log"
        script = Path(__file__).with_name("driver.py")
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, script, "grow", self._notes, str(num_units)],
                stdout=output,
                stderr=output,
                env={**environment(), "RAY_ADDRESS": hosts.address},
            )

    @property
    def nodes(self) -> list[str]:
        """Of each finished unit, in order."""
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """Seconds until it holds."""
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() - began < PATIENCE_SECONDS, self.log
            time.sleep(0.1)
        return time.monotonic() - began


def test_a_new_host_is_used_and_a_lost_one_is_noticed(hosts: Hosts, tmp_path: Path) -> None:
    driver = Driver(hosts, tmp_path, 200)
    try:
        driver.wait_for(lambda: len(driver.nodes) > 0)
        hosts.add()
        used = driver.wait_for(lambda: len({*driver.nodes}) == 2)
        before = driver.nodes
        for process in hosts.processes(1):  # as when its link is cut: no connection is closed
            os.kill(process.pid, signal.SIGSTOP)
        lost = driver.wait_for(lambda: "was lost on" in driver.log)
        print(f"new host used after {used:.1f} s, frozen host noticed after {lost:.1f} s")
        after = len(driver.nodes)
        driver.wait_for(lambda: len(driver.nodes) > after + 1)
        assert len(before) < after
        assert "cannot be scheduled" not in driver.log, driver.log
    finally:
        driver.process.kill()
        driver.process.wait()
