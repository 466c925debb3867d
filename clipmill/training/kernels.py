"""Counts the bytes that CUDA kernels keep for the backward pass, with fake tensors, on any machine.

A CPU build of torch has no autograd for fake CUDA tensors, and a CPU keeps other tensors than a GPU: it materialises
the L x L scores of an attention with dropout, and keeps dropout's noise as floats. Stand-ins for these operations keep
what the CUDA kernels do (aten's ``_scaled_dot_product_flash_attention``, ``_scaled_dot_product_efficient_attention``
and ``native_dropout``); all others keep the same on both.

B: batch   N, M: heads of queries, of keys and values   L: positions   D: channels of a head
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["AsOnCuda", "saved_bytes"]


class AsOnCuda(TorchFunctionMode):
    """Makes attention and dropout keep what they keep on CUDA. Only for fake tensors, because the results are empty."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True  # so that grouped heads are not repeated: CUDA's attention takes them as they are
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Takes q [B, N, L, D], k and v [B, M, S, D]. Keeps these, the result, and the log-sum-exp of each row."""
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Keeps the dropout mask, one byte per element."""
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _Dropout.apply(x) if training and p else x


def saved_bytes(run: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Bytes that autograd holds after a forward pass.

    Args:
        run: the pass.
        own: parameters and buffers, which are not counted.
    """
    counted = {tensor.untyped_storage()._cdata for tensor in own}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in counted:
            held[storage._cdata] = tensor  # keeps it alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
