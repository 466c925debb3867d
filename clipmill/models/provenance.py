"""What the output of a model depends on beside its weights and its input."""

from __future__ import annotations

import platform
from typing import Any

import torch

import clipmill

__all__ = ["computed_with"]


def computed_with(device: torch.device) -> dict[str, Any]:
    """Versions, hardware class and number of threads, for the record beside what was computed on ``device``."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "clipmill": clipmill.__version__,
        "torch": torch.__version__,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
    }
