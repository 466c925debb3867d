"""A driver process for the signal tests: ``python driver.py fan_out|scratch|train FOLDER [DRAIN_SECONDS]``; exits as
clipmill's CLI does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipmill.cluster import Report, fan_out, run_workers
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, Interrupted
from clipmill.scratch import ScratchFolder


def make_worker(folder: str) -> Callable[[int], dict[str, Any]]:
    def work(unit: int) -> dict[str, Any]:
        time.sleep(0.2)
        (Path(folder) / f"unit-{unit}").touch()
        return {}

    return work


def make_scratch_worker(folder: str) -> Callable[[int], dict[str, Any]]:
    def work(unit: int) -> dict[str, Any]:
        with ScratchFolder("test") as scratch:
            (scratch / "video").touch()
            time.sleep(8)
            (scratch / "video").rename(Path(folder) / str(unit))
        return {}

    return work


def train(folder: str, report: Report) -> None:
    for step in range(10_000):
        time.sleep(0.05)
        report.update({"step": step})
        if report.stop_requested:
            time.sleep(1)  # the checkpoint
            (Path(folder) / "checkpoint").touch()
            raise Interrupted(f"stopped after step {step}")


def main(mode: str, folder: str, drain_seconds: str = "15") -> int:
    config = ClusterConfig(num_cpus=2, drain_seconds=int(drain_seconds))
    try:
        if mode == "fan_out":
            fan_out(make_worker, (folder,), range(1000), config=config, on_result=lambda unit, _: print("at work"))
        elif mode == "scratch":
            fan_out(make_scratch_worker, (folder,), range(100), config=config, on_result=lambda *_: None)
        else:
            run_workers(train, folder, config=config, name="test", on_progress=lambda _: print("at work"))
    except ClipmillError as error:
        print(type(error).__name__, error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main(*sys.argv[1:]))
