"""A driver process for tests: ``python driver.py MODE FOLDER [NUMBER]``; exits as clipmill's CLI does.

MODE is ``train``, ``grow``, or one of FAN_OUTS (NUMBER: ``drain_seconds``).
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


def make_disk_worker(folder: str) -> Callable[[int], dict[str, Any]]:
    def work(unit: int) -> dict[str, Any]:
        with ScratchFolder("test") as scratch:
            (scratch / "clips").write_bytes(bytes(1_000_000))
            time.sleep(5)
        (Path(folder) / str(unit)).touch()
        return {}

    return work


def train(folder: str, report: Report) -> None:
    with report.hold_stops():
        for step in range(10_000):
            time.sleep(0.05)
            report.update({"step": step})
            if report.stop_requested:
                time.sleep(1)  # the checkpoint
                (Path(folder) / "checkpoint").touch()
                raise Interrupted(f"stopped after step {step}")


def make_recording_worker(record: str) -> Callable[[int], dict[str, Any]]:
    """Notes on which node each unit runs."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    resources = {each["NodeID"]: each["Resources"] for each in ray.nodes()}[node]
    kind = "head" if "node:__internal_head__" in resources else "worker"

    def work(unit: int) -> dict[str, Any]:
        time.sleep(3)
        with Path(record).open("a") as file:
            file.write(f"{kind} {node}\n")
        return {}

    return work


FAN_OUTS = {"fan_out": (make_worker, 1000), "scratch": (make_scratch_worker, 100), "disk": (make_disk_worker, 60)}


def main(mode: str, folder: str, number: str = "15") -> int:
    try:
        if mode == "train":
            config = ClusterConfig(num_cpus=2)
            run_workers(train, folder, config=config, name="test", on_progress=lambda _: print("at work"))
        elif mode == "grow":
            units = range(int(number))
            fan_out(make_recording_worker, (folder,), units, config=ClusterConfig(), on_result=lambda *_: None)
        else:
            config = ClusterConfig(num_cpus=2, drain_seconds=int(number))
            make, num_units = FAN_OUTS[mode]
            fan_out(make, (folder,), range(num_units), config=config, on_result=lambda unit, _: print("at work", unit))
    except ClipmillError as error:
        print(type(error).__name__, error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main(*sys.argv[1:]))
