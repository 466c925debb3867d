"""Checks that a killed and resumed training has exactly the losses of an undisturbed one, on this machine's device.

A toy prior with dropout trains twice on the same tokens: once undisturbed, and once with a SIGKILL after its first
checkpoint, followed by the same command again. The curves are compared bit for bit.

    python benchmarks/exact_resume.py [--zero-stages 0 1 2 3]

The last line is one JSON object; ``exact`` says for each ZeRO stage whether all losses are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import device_name

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
from tests.training.toy import read_losses, stage_command, write_inputs  # noqa: E402

LIMIT_SECONDS = 240
LENGTH = ("prior.training.steps=300", "prior.training.checkpoint_every=50")
"""Long enough for a kill in the middle."""


def main() -> None:
    """Compares, and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zero-stages", type=int, nargs="*", default=[0, 1])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        inputs = Path(folder)
        write_inputs(inputs)
        exact = {stage: is_exact(inputs, stage) for stage in arguments.zero_stages}
    print(json.dumps({"benchmark": "exact_resume", "device": device_name(), "exact": exact}))


def is_exact(inputs: Path, zero_stage: int) -> bool:
    """Whether the killed run's curve is that of the undisturbed one."""
    curves = []
    for name in ("undisturbed", "killed"):
        root = inputs / f"{name}-{zero_stage}"
        command = [sys.executable, "-m", "clipmill", *stage_command(inputs, root, "train-prior", zero_stage, *LENGTH)]
        if name == "killed":
            run_killed(command, root)
        subprocess.run(command, check=True, timeout=LIMIT_SECONDS, env=environment(), stdout=subprocess.DEVNULL)
        curves.append(read_losses(root / "prior"))
    print(f"ZeRO {zero_stage}: {len(curves[0])} losses, equal: {curves[0] == curves[1]}", flush=True)
    return bool(curves[0]) and curves[0] == curves[1]


def run_killed(command: list[str], root: Path) -> None:
    """Starts the training and kills it once a checkpoint is complete."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not list((root / "prior" / "checkpoints").glob("*/*/COMMITTED")):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the training ended with {process.poll()} before its first checkpoint")
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """Of the trainings: this checkout's code."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


if __name__ == "__main__":
    main()
