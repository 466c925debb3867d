"""Every measurement that needs a GPU, in one command: `make bench-gpu`.

    python benchmarks/gpu.py [--skip tokenize ...] [--only prior ...] [--minutes 9]

Needs torch with CUDA, DeepSpeed and this checkout, but neither Ray nor a network. Each part is a program in this
folder, run with settings for a GPU:

    prior     prior.py: presets 100m, 350m and 1b; the training loop against the bare loop at ZeRO 0 to 3; our model
              against the published one
    vqvae     vqvae.py: BAIR's and UCF-101's settings; our model against the published one
    sample    sample.py: tokens/s against the bandwidth, both decoders
    tokenize  tokenization.py: a worker of the stage against the bare encoder
    resume    exact_resume.py: a killed training's losses, bit for bit

The parts share the time. A part that exceeds its limit is ended and named; the others still run. Prints a table of all
numbers with the name of the hardware. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).resolve().parent


class Part(NamedTuple):
    """One program and its share of the time."""

    command: tuple[str, ...]
    share: float


PARTS = {
    "prior": Part(("prior.py", "--precision", "bfloat16", "--zero-stages", "0", "1", "2", "3"), 0.4),
    "vqvae": Part(("vqvae.py",), 0.25),
    "sample": Part(("sample.py",), 0.15),
    "tokenize": Part(("tokenization.py", "--device", "cuda", "--hidden-dim", "240", "--decode-cpus", "8"), 0.1),
    "resume": Part(("exact_resume.py", "--zero-stages", "0", "1"), 0.1),
}


def main() -> None:
    """Runs the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False on this machine")
    chosen = [name for name in PARTS if name in arguments.only and name not in arguments.skip]
    ends = time.monotonic() + 60 * arguments.minutes
    results = {}
    for place, name in enumerate(chosen):
        # What a part leaves over goes to those that follow.
        share = PARTS[name].share / sum(PARTS[later].share for later in chosen[place:])
        results[name] = run(PARTS[name].command, share * (ends - time.monotonic()))
    hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    print(table(hardware, results))
    print(json.dumps({"benchmark": "gpu", "device": hardware, "torch": torch.__version__, "parts": results}))


def run(command: tuple[str, ...], limit_seconds: float) -> dict[str, Any]:
    """The last line of a program as JSON, or ``{"failed": why}``; what it prints before goes through."""
    line = [sys.executable, str(FOLDER / command[0]), *command[1:]]
    print(f"{' '.join(command)}, at most {limit_seconds:.0f} s", flush=True)
    try:
        done = subprocess.run(
            line,
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit_seconds,
            env={"PYTHONPATH": str(FOLDER.parent), "OMP_WAIT_POLICY": "passive", **os.environ},
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {limit_seconds:.0f} s"}
    print(done.stdout, end="", flush=True)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def table(hardware: str, results: dict[str, dict[str, Any]]) -> str:
    """All numbers, a line each, as Markdown."""
    lines = [f"On {hardware}:", "", "| part | measure | value |", "|---|---|---|"]
    for part, result in results.items():
        lines += [f"| {part} | {name} | {value} |" for name, value in flat(result)]
    return "\n".join(lines)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested results with dotted names."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}.")
        else:
            yield name, value


if __name__ == "__main__":
    main()
