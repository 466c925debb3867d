"""A Ray cluster of several hosts on this machine: each has an address of the loopback and its own temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.ports import free_port

START_SECONDS = 300


HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""What the files of deploy/ set for the head: a host that does not answer is given up after 21 s, not 65 s."""


class Hosts:
    """Hosts of one CPU each, the head first; `kill` takes the power of one away, `add` brings another.

    Args:
        count: of hosts to begin with.
        more: variables of their processes.
    """

    def __init__(self, count: int, **more: str) -> None:
        self._more = more
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: it becomes part of a socket's path
        self._hosts: list[subprocess.Popen[bytes]] = []
        self._head = f"{self.address_of(0)}:{self._head_port()}"
        try:
            for _ in range(count):
                self.add()
        except BaseException:
            self.stop()
            raise

    @property
    def address(self) -> str:
        """The head's, for ``cluster.address``."""
        return self._head

    @property
    def newest(self) -> int:
        """Number of the host that came last."""
        return len(self._hosts) - 1

    def address_of(self, number: int) -> str:
        """The address of a host; to Ray, 127.0.0.1 is every host's."""
        return f"127.0.0.{number + 2}"

    def _head_port(self) -> int:
        return free_port(self.address_of(0))

    def _head_options(self) -> list[str]:
        return ["--include-dashboard=false", f"--temp-dir={self._folder / 'ray'}"]

    def _on_host(self, number: int, temporary: Path) -> tuple[list[str], dict[str, str]]:
        """What stands before a command so that it runs on a host, and variables for it."""
        return [], {"TMPDIR": str(temporary)}

    def add(self, temporary: Path | None = None) -> None:
        """Starts one more host; returns when it is part of the cluster.

        Args:
            temporary: its folder for temporary files; None: a new one.
        """
        if temporary is None:
            (temporary := self._folder / f"host-{len(self._hosts)}").mkdir()
        self._hosts.append(self._start(len(self._hosts), temporary))

    def _start(self, number: int, temporary: Path) -> subprocess.Popen[bytes]:
        place = [f"--address={self._head}"]
        if number == 0:
            place = ["--head", f"--port={self._head.rpartition(':')[2]}", *self._head_options()]
        address = f"--node-ip-address={self.address_of(number)}"
        limits = ["--num-cpus=1", f"--object-store-memory={100 * 2**20}"]
        before, variables = self._on_host(number, temporary)
        log = self._folder / f"host-{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *before,
                    Path(sys.executable).with_name("ray"),
                    "start",
                    *place,
                    address,
                    *limits,
                    "--block",
                    "--disable-usage-stats",
                ],
                stdout=output,
                stderr=output,
                env={**environment(), **self._more, **variables},
            )
        try:
            self._wait_until_started(process, log)
        except BaseException:
            _kill(process)
            raise
        return process

    @staticmethod
    def _wait_until_started(process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def processes(self, number: int) -> list[psutil.Process]:
        """Every process of a host."""
        return _family(self._hosts[number])

    def kill(self, number: int) -> None:
        """SIGKILL for every process of a host."""
        _kill(self._hosts[number])

    def stop(self) -> None:
        """Ends all hosts."""
        for host in self._hosts:
            _kill(host)
        shutil.rmtree(self._folder, ignore_errors=True)


def _family(host: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [*psutil.Process(host.pid).children(recursive=True), psutil.Process(host.pid)]


def _kill(host: subprocess.Popen[bytes]) -> None:
    if host.poll() is not None:
        return
    family = _family(host)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # the first of a namespace takes the others with it
            process.kill()
    host.wait()
    psutil.wait_procs(family)


def environment() -> dict[str, str]:
    """What hosts and drivers need to meet, on a busy machine too.

    A token, of which only some of them know, would keep them apart. A raylet that waits 30 s for its agent aborts.
    """
    return {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_raylet_start_wait_time_s": str(START_SECONDS),
        "RAY_agent_register_timeout_ms": str(1000 * START_SECONDS),
    }
