"""Clips gradients, and leaves steps out whose gradients are not finite, without asking the host.

At ZeRO stages 0 to 2. At stage 3, and with the optimizer offloaded, DeepSpeed does both by itself; it reads the norm on
the host in every step, which no setting avoids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Guard"]


class Guard:
    """Clips the gradients and leaves bad steps out, from within the optimizer's step.

    Args:
        optimizer: fused AdamW with one group of parameters, whose kernel takes both decisions from tensors.
        max_norm: largest global norm of the gradients; 0: any.
        partitioned: each rank has the gradients of its own part (ZeRO 1 and 2), else all have all of them.

    Attributes:
        norm: of the newest step before clipping, float32 0-d on the device; none before the first.
    """

    norm: Tensor | None = None

    def __init__(self, optimizer: torch.optim.AdamW, max_norm: float, partitioned: bool) -> None:
        self._max_norm, self._partitioned = max_norm, partitioned
        optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Any, _: Any, __: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms = torch._foreach_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        square = torch.stack(norms).square().sum()
        if self._partitioned:
            dist.all_reduce(square)
        self.norm = square.sqrt()
        optimizer.found_inf = (~self.norm.isfinite()).float()  # the kernel then touches nothing
        if self._max_norm:
            optimizer.grad_scale = ((self.norm + 1e-6) / self._max_norm).clamp(min=1)  # it divides by this
