"""``made.json``: when, where and with which software an evaluation was made. Metrics do not depend on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import clipmill

__all__ = ["hardware_name", "provenance"]

_PACKAGES = ("torch", "numpy", "av", "torchmetrics")


def provenance(hardware: Collection[str], seconds: float, root: str, samples: str | None) -> dict[str, Any]:
    """The content of ``made.json``.

    Args:
        hardware: of the workers, from `hardware_name`; empty if all parts existed already.
        seconds: duration of the evaluation.
        root: URL of the run, without credentials.
        samples: name of the set of samples; None if only a tokenizer is evaluated.

    Returns:
        ``at`` (UTC, to the second), ``host`` of the command, ``hardware`` of the workers (or of this host if all parts
        existed already), ``cpus`` of this host, ``versions``, ``commit`` of clipmill's source (None outside a
        checkout), ``seconds``, ``root``, ``samples``.
    """
    return {
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "host": socket.gethostname(),
        "hardware": sorted(hardware) or [hardware_name(torch.device("cpu"))],
        "cpus": os.cpu_count(),
        "versions": {"clipmill": clipmill.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "seconds": round(seconds, 3),
        "root": root,
        "samples": samples,
    }


def hardware_name(device: torch.device) -> str:
    """Model of the GPU, or of this machine's CPU if the kernel reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    """Commit of the checkout that this clipmill runs from, with ``+changes`` if files differ from it."""
    folder = Path(clipmill.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if git("ls-files", "--", "__init__.py") != "__init__.py":  # inside somebody else's checkout, as an environment
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
