"""Records, and fixes, what a model's output depends on besides weights and input."""

from __future__ import annotations

import platform
from typing import Any

import torch

import clipmill
from clipmill.config import ClusterConfig
from clipmill.errors import UserError

__all__ = ["computed_with", "make_process_deterministic"]


def computed_with(device: torch.device) -> dict[str, Any]:
    """Versions, hardware class and number of threads, to record with results computed on ``device``."""
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


def make_process_deterministic(config: ClusterConfig) -> torch.device:
    """Configures this process so that a model gives reproducible bytes. Returns the device to compute on.

    Raises:
        UserError: ``cluster.use_gpu`` is set, but this machine has no GPU.
    """
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError(
            f"cluster.use_gpu=true, but torch {torch.__version__} finds no GPU on {platform.node()}; run on a machine "
            "with a GPU, install a torch for CUDA, or set cluster.use_gpu=false"
        )
    torch.set_num_threads(config.fanout_cpus)  # sums are split over threads, so the result depends on their number
    torch.backends.cudnn.deterministic = True
    # Training in the same process may have changed these.
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if config.use_gpu else "cpu")
