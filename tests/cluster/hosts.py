"""A Ray cluster of several hosts on this machine: each has an address of the loopback and its own temporary folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.ports import free_port

START_SECONDS = 120


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
        self._head = f"127.0.0.2:{free_port('127.0.0.2')}"
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

    def add(self, temporary: Path | None = None) -> None:
        """Starts one more host; returns when it is part of the cluster.

        Args:
            temporary: its folder for temporary files; None: a new one.
        """
        number = len(self._hosts)
        if temporary is None:
            (temporary := self._folder / f"host-{number}").mkdir()
        place = [f"--address={self._head}"]
        if number == 0:
            port = self._head.rpartition(":")[2]
            place = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self._folder / 'ray'}"]
        address = f"--node-ip-address=127.0.0.{number + 2}"  # to Ray, 127.0.0.1 is every host's
        options = ["--block", "--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats"]
        log = self._folder / f"host-{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("ray"), "start", *place, address, *options],
                stdout=output,
                stderr=output,
                env={**environment(), **self._more, "TMPDIR": str(temporary)},
            )
        self._hosts.append(process)
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def processes(self, number: int) -> list[psutil.Process]:
        """Every process of a host."""
        host = self._hosts[number]
        return [*psutil.Process(host.pid).children(recursive=True), psutil.Process(host.pid)]

    def kill(self, number: int) -> None:
        """SIGKILL for every process of a host."""
        family = self.processes(number)
        for process in family:
            process.kill()
        self._hosts[number].wait()
        psutil.wait_procs(family)

    def stop(self) -> None:
        """Ends all hosts."""
        for number, host in enumerate(self._hosts):
            if host.poll() is None:
                self.kill(number)
        shutil.rmtree(self._folder, ignore_errors=True)


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
