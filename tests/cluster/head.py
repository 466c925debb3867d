"""A Ray head with a Jobs server, on ports of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.ports import wait_for_port

HOST = "127.0.0.2"
START_SECONDS = 120


class Head(NamedTuple):
    """Where it answers, and where it keeps its own files."""

    jobs: str
    """URL of the Jobs server."""
    metrics: str
    """URL that Prometheus reads."""
    folder: Path
    """Logs and whatever else Ray writes."""


@contextlib.contextmanager
def started_head(num_cpus: int = 2, **environment: str) -> Iterator[Head]:
    """A head within the block, its processes with more variables in their environment."""
    ports = []
    with contextlib.ExitStack() as probes:  # all at once, so that no two are the same
        for _ in range(5):
            ports.append(probes.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
    gcs, dashboard, agent, client, metrics = ports
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: it becomes part of a socket's path
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--num-cpus={num_cpus}",
        f"--node-ip-address={HOST}", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--temp-dir={folder}",
        f"--object-store-memory={256 * 2**20}", "--disable-usage-stats",
    ]  # fmt: skip
    # A token file on this machine would switch authentication on for the servers but not for their clients.
    more = {"RAY_raylet_start_wait_time_s": str(START_SECONDS), "RAY_AUTH_MODE": "disabled", **environment}
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **more})
    try:
        wait_for_port(process, dashboard, START_SECONDS, log.read_text)
        yield Head(f"http://127.0.0.1:{dashboard}", f"http://{HOST}:{metrics}/metrics", folder)
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGTERM)
        for survivor in psutil.wait_procs(family, timeout=30)[1]:
            survivor.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
