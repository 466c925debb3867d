"""The tokenizer's convolutions: SAME zero padding for kernels 3 and 4, their mirror, and channel mixing as a product.

All keep channels-last memory: features [B, C, T, H, W] whose channels are contiguous. The causal ones see no later
frame: frame 0 has a latent frame of its own, latent frame j > 0 follows frames up to s * j (s: stride).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Grow", "Mix", "Pointwise", "Shrink"]

KERNEL = 4
COLOURS = 3
"""So many outputs take a detour on a CPU: `_GrowToColours`."""


class Pointwise(nn.Linear):
    """Convolution with kernel 1 over [B, C, T, H, W], as a matrix product: 4 times as fast on one CPU thread."""

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the channels of x [B, C, T, H, W]."""
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Mix(nn.Conv3d):
    """Convolution with kernel 3 and SAME zero padding; if causal, all of the time's padding is in front."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, causal: bool = False) -> None:
        super().__init__(in_dim, out_dim, kernel_size=3, padding=(0 if causal else 1, 1, 1), bias=bias)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Mixes neighbours of x [B, C, T, H, W]."""
        return super().forward(F.pad(x, (0, 0, 0, 0, 2, 0)) if self.causal else x)


class Shrink(nn.Conv3d):
    """Convolution with kernel 4 and SAME zero padding; of an odd padding more is in front, of a causal one all."""

    def __init__(self, in_dim: int, out_dim: int, stride: tuple[int, int, int], causal: bool = False) -> None:
        super().__init__(in_dim, out_dim, kernel_size=KERNEL, stride=stride, padding=(0 if causal else 1, 1, 1))
        # Stride 2 pads (1, 1), stride 1 pads (2, 1): the convolution pads 1, this the rest (last axis first).
        self.front = [pad for s in reversed(stride) for pad in (2 - s, 0)]
        if causal:
            self.front[-2] = KERNEL - 1

    def forward(self, x: Tensor) -> Tensor:
        """Divides each axis of x [B, C, T, H, W] by its stride; causal frames 1 + n * s become 1 + n."""
        return super().forward(F.pad(x, self.front) if any(self.front) else x)


class Grow(nn.ConvTranspose3d):
    """Transposed convolution with kernel 4, the mirror of ``Shrink``."""

    stride: tuple[int, int, int]

    def __init__(self, in_dim: int, out_dim: int, stride: tuple[int, int, int], causal: bool = False) -> None:
        super().__init__(in_dim, out_dim, kernel_size=KERNEL, stride=stride, padding=(0 if causal else 1, 1, 1))
        self.causal = causal

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Multiplies each axis of x [B, C, T, H, W] by its stride; causal frames 1 + n become 1 + n * s."""
        if self.causal:
            s = self.stride[0]
            t, h, w = 1 + (x.shape[2] - 1) * s, x.shape[3] * self.stride[1], x.shape[4] * self.stride[2]
            return super().forward(x)[:, :, s - 1 : s - 1 + t, :h, :w]
        if self.out_channels == COLOURS and x.device.type == "cpu":
            return _GrowToColours.apply(x, self.weight, self.bias, self.stride)
        grown = super().forward(x)
        if min(self.stride) == 2:
            return grown
        t, h, w = (length * s for length, s in zip(x.shape[2:], self.stride, strict=True))
        return grown[:, :, :t, :h, :w]  # an axis of stride 1 comes out one too long at its end


class _GrowToColours(torch.autograd.Function):
    """``Grow`` whose forward pass is an ordinary convolution: 3 times as fast with 3 outputs on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        # Output o of an axis with stride s takes input i through tap k where o + 1 = s * i + k. With
        # k = s * a + p every phase p of the outputs is a convolution of 4 / s taps a over i.
        taps = [KERNEL // s for s in stride]
        phases = [size for tap, s in zip(taps, stride, strict=True) for size in (tap, s)]
        kernel = weight.reshape(*weight.shape[:2], *phases).permute(3, 5, 7, 1, 0, 2, 4, 6).flip(5, 6, 7)
        y = F.conv3d(x, kernel.flatten(0, 3), bias.repeat(math.prod(stride)), padding=[tap - 1 for tap in taps])
        y = y.permute(0, 2, 3, 4, 1)  # [B, m_t, m_h, m_w, phases and channels], o + 1 = s * m + p
        b, *sizes = y.shape[:4]
        y = y.reshape(b, *sizes, *stride, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        y = y.reshape(b, *(size * s for size, s in zip(sizes, stride, strict=True)), -1)
        t, h, w = (1 + length * s for length, s in zip(x.shape[2:], stride, strict=True))
        return y[:, 1:t, 1:h, 1:w].permute(0, 4, 1, 2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        extra = [2 - s for s in ctx.stride]  # what `Grow` crops off an axis of stride 1 has no gradient
        if any(extra):
            grad = F.pad(grad, [pad for size in reversed(extra) for pad in (0, size)])
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), [0], ctx.stride, [1] * 3, [1] * 3, True, [0] * 3, 1, [True, True, False]
        )
        return grad_x, grad_weight.to(weight.dtype), grad.sum((0, 2, 3, 4), dtype=weight.dtype), None
