"""Computations over all ranks: sums, and batch normalisation with the statistics of all clips.

torch's SyncBatchNorm does not support CPU tensors. The norm here is an ordinary batch norm whose statistics, and the
two sums of its gradient, are reduced over the ranks. Without an initialised process group, or with one rank, everything
is local. Every rank must hold the same number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GlobalBatchNorm", "rank", "sum_over_ranks", "world_size"]


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class _NormOverRanks(torch.autograd.Function):
    """Batch norm in training mode, with statistics and gradient means over the rows of all ranks.

    It uses the native single-rank kernels, which keep channels-last memory and store no copy of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        # One collective, in which each rank fills its slot. The variance between ranks then needs no difference of
        # large sums, which would cancel.
        slots = x.new_zeros(world_size(), 2, x.shape[1], dtype=torch.float32)
        slots[rank(), 0], slots[rank(), 1] = mean, var
        means, variances = sum_over_ranks(slots).unbind(1)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        # With the statistics as constants: grad_x is the gradient times scale, the others are this rank's sums.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        num_rows = x.numel() // x.shape[1] * world_size()
        mean_grad, mean_grad_normal = sum_over_ranks(torch.stack((grad_bias, grad_weight))) / num_rows
        # The gradient through the statistics is an affine function of the normalised x.
        scale = weight * torch.rsqrt(var + ctx.eps)
        grad_x += F.batch_norm(x, mean, var, -scale * mean_grad_normal, -scale * mean_grad, training=False, eps=ctx.eps)
        return grad_x, grad_weight, grad_bias, None


class GlobalBatchNorm(nn.Module):
    """BatchNorm over [B, C, T, H, W] with the statistics of all ranks' clips (Ioffe & Szegedy, arXiv 1502.03167).

    Args:
        dim: channels C.
        momentum: weight of the newest batch in the running statistics that eval mode uses.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [B, C, T, H, W]."""
        if not self.training or world_size() == 1:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        y, mean, var = _NormOverRanks.apply(x, self.weight, self.bias, self.eps)
        num_rows = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (num_rows / (num_rows - 1)), self.momentum)
        return y
