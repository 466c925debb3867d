"""Starts the stages as their users do: real processes, under torchrun where there are several ranks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.ports import free_port


def start(command: list[str], *, num_ranks: int, log: Path, module: str = "clipmill.cli") -> subprocess.Popen[bytes]:
    """``clipmill COMMAND`` on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-port", str(free_port())]
    run = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", module, *command]
    with log.open("ab") as output:
        return subprocess.Popen(
            run,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )


def run(command: list[str], log: Path, num_ranks: int) -> None:
    """Lets it end, which it must do well."""
    process = start(command, num_ranks=num_ranks, log=log)
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    """Looks again and again, as long as the process lives."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the launcher and all its ranks, like a node that loses power.

    Not by process group: torchrun gives each rank a session of its own.
    """
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
            member.kill()
    process.wait()
    psutil.wait_procs(family)
