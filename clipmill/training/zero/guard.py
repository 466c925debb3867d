"""Clips gradients, and leaves steps out where they are not finite or far larger than usual, without asking the host.

At ZeRO stages 0 to 2. At stage 3, and with the optimizer offloaded, DeepSpeed does both by itself; it reads the norm on
the host in every step, which no setting avoids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Guard"]

USUAL_STEPS = 50
"""That the usual norm is a moving average of."""
STEPS_TO_LEARN = 20
"""Before which nothing is a spike."""


class Guard:
    """Clips the gradients and leaves bad steps out, from within the optimizer's step.

    Args:
        optimizer: fused AdamW, whose kernel takes both decisions from tensors.
        max_norm: maximum global gradient norm; 0 disables clipping.
        num_ranks: that share the training.
        partitioned: each rank has the gradients of its own part (ZeRO 1 and 2), else all have all of them.
        spike_factor: skip steps whose norm exceeds this multiple of the running mean; None disables the check.

    Attributes:
        norm: of the newest step before clipping, float32 0-d on the device; none before the first.
        skipped: whether that step was, bool 0-d on the device.
        usual: the usual norm and the number of steps that it comes from, float32 [2]; zeros without a ``spike_factor``.
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
            dist.broadcast(square, 0)  # a last bit that differs must not let one rank step and another not
        self.norm = square.sqrt()
        self.skipped = ~self.norm.isfinite()
        if self._spike_factor is not None:
            self._look_for_spike(self.norm, self._spike_factor)
        optimizer.found_inf = self.skipped.float()  # the kernel then touches nothing
        if self._max_norm:
            optimizer.grad_scale = ((self.norm + 1e-6) / self._max_norm).clamp(min=1)  # it divides by this

    def _look_for_spike(self, norm: Tensor, factor: float) -> None:
        self.usual = self.usual.to(norm.device)
        mean, count = self.usual
        learned = count >= STEPS_TO_LEARN
        limit = torch.where(learned, factor * mean, torch.inf)
        # A spike counts as the largest norm that is none: what has come to stay becomes usual within some steps.
        newest = mean + (norm.minimum(limit) - mean) / (count + 1).clamp(max=USUAL_STEPS)
        self.usual = torch.where(norm.isfinite(), torch.stack((newest, count + 1)), self.usual)
        self.skipped |= norm > limit
