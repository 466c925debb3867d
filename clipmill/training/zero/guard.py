"""Clips gradients, and skips steps whose gradients are not finite or spike, without waiting for the device.

It works at ZeRO stages 0 to 2. At stage 3, and with an offloaded optimizer, DeepSpeed does both itself. It then reads
the norm on the host in every step, and no setting avoids that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Guard"]

USUAL_STEPS = 50
"""Number of steps in the running average of the norm."""
STEPS_TO_LEARN = 20
"""Number of steps before the first that can be a spike."""


class Guard:
    """Clips gradients and skips bad steps, in a hook of the optimizer's step.

    Args:
        optimizer: fused AdamW, whose kernel reads both decisions from tensors.
        max_norm: maximum global gradient norm; 0 disables clipping.
        num_ranks: number of ranks.
        partitioned: each rank has the gradients of its own part (ZeRO 1 and 2); if False, each rank has all gradients.
        spike_factor: skip steps whose norm exceeds this multiple of the running mean; None disables the check.

    Attributes:
        norm: of the newest step before clipping, float32 0-d on the device; not set before the first step.
        skipped: whether that step was skipped, bool 0-d on the device.
        usual: running mean of the norm and its number of steps, float32 [2]; zeros without a ``spike_factor``.
    """

    norm: Tensor | None = None
    skipped: Tensor

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        max_norm: float,
        *,
        num_ranks: int,
        partitioned: bool,
        spike_factor: float | None,
    ) -> None:
        self._max_norm, self._num_ranks, self._partitioned = max_norm, num_ranks, partitioned
        self._spike_factor = spike_factor
        self.usual = torch.zeros(2)
        optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Any, _: Any, __: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms = torch._foreach_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        square = torch.stack(norms).square().sum()
        if self._num_ranks > 1 and self._partitioned:
            dist.all_reduce(square)
        elif self._num_ranks > 1:
            dist.broadcast(square, 0)  # so that a different last bit cannot make ranks decide differently
        self.norm = square.sqrt()
        self.skipped = ~self.norm.isfinite()
        if self._spike_factor is not None:
            self._look_for_spike(self.norm, self._spike_factor)
        optimizer.found_inf = self.skipped.float()  # if 1, the kernel changes nothing
        if self._max_norm:
            optimizer.grad_scale = ((self.norm + 1e-6) / self._max_norm).clamp(min=1)  # the kernel divides by this

    def _look_for_spike(self, norm: Tensor, factor: float) -> None:
        self.usual = self.usual.to(norm.device)
        mean, count = self.usual
        learned = count >= STEPS_TO_LEARN
        limit = torch.where(learned, factor * mean, torch.inf)
        # A spike enters the mean as the limit, so a lasting new level is accepted after some steps.
        newest = mean + (norm.minimum(limit) - mean) / (count + 1).clamp(max=USUAL_STEPS)
        self.usual = torch.where(norm.isfinite(), torch.stack((newest, count + 1)), self.usual)
        self.skipped |= norm > limit
