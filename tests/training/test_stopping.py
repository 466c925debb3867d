"""SIGTERM at random moments of a training with validations: each is a stop, and costs nothing."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.processes import run, start, wait_for
from tests.training.toy import read_losses, stage_command

NUM_MOMENTS = 30
SETTINGS = ["prior.training.steps=400", "prior.training.val_every=20", "prior.training.checkpoint_every=50"]


def _takes_signals(process: subprocess.Popen[bytes]) -> bool:
    """Whether the interpreter has come to our first line: before it no program has a say in its status."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _stop(command: list[str], log: Path, delay: float) -> tuple[int, float | None]:
    """The exit status, and the seconds from the signal to the end; None if it ended before the signal."""
    process = start(command, num_ranks=1, log=log)
    wait_for(lambda: _takes_signals(process), process, log)
    try:
        return process.wait(timeout=delay), None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        return process.wait(timeout=600), time.monotonic() - sent


def _result(root: Path) -> tuple[dict[int, float], list[str]]:
    return read_losses(root / "prior"), sorted(path.name for path in (root / "prior" / "exports").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigterm_at_any_moment_is_a_stop(workspace: Path, tmp_path: Path) -> None:
    log, moments, took = tmp_path / "log.txt", random.Random(0), []
    began = time.monotonic()
    run(stage_command(workspace, tmp_path / "whole", "train-prior", 1, *SETTINGS), log, 1)
    life_seconds = time.monotonic() - began
    undisturbed = _result(tmp_path / "whole")
    number, status = 0, 75
    while len(took) < NUM_MOMENTS or status == 75:
        root = tmp_path / f"stopped-{number}"
        delay = moments.uniform(0, life_seconds) if len(took) < NUM_MOMENTS else 600
        status, seconds = _stop(stage_command(workspace, root, "train-prior", 1, *SETTINGS), log, delay)
        print(f"{delay:.2f} s: exit status {status}", "" if seconds is None else f"{seconds:.2f} s later", flush=True)
        assert status in (0, 75), log.read_text()[-3000:]
        took += [] if seconds is None else [seconds]
        if status == 0:
            assert _result(root) == undisturbed
            number += 1
    assert number > 1, "no training came to its end between the signals"
    print(f"{len(took)} signals, at most {max(took):.1f} s to the end")  # on a busy machine no limit holds
