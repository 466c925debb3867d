"""Ports of servers that tests start."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable


def free_port(host: str = "127.0.0.1") -> int:
    """A port of a host of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_for_port(
    process: subprocess.Popen[bytes], port: int, timeout_seconds: float, describe: Callable[[], object]
) -> None:
    """Waits until a server accepts connections; fails with its description if it ends or takes too long."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, describe()
            assert time.monotonic() < deadline, describe()
            time.sleep(0.1)
