"""The tokenizer's convolutions: kernels 3 and 4 with SAME zero padding, their transposes, and kernel 1 as a product.

All keep channels-last memory: features [B, C, T, H, W] whose channels are contiguous. Causal convolutions depend on no
later frame: frame 0 has its own latent frame, and latent frame j > 0 depends on frames up to s * j (s: stride).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Upsample",
    "SameConv3d",
    "Pointwise",
    "Downsample",
    "upsample_by_phases",
    "downsample_by_phases",
    "is_on_gpu",
]

KERNEL = 4
COLOURS = 3
"""Output channels of the last convolution, which has a special implementation on a CPU: `_UpsampleToColours`."""


class Pointwise(nn.Linear):
    """Convolution with kernel 1 over [B, C, T, H, W], as a matrix product: 4 times as fast on one CPU thread."""

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the channels of x [B, C, T, H, W]."""
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class SameConv3d(nn.Conv3d):
    """Convolution with kernel 3 and SAME zero padding. If causal, all padding along time is in front."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, causal: bool = False) -> None:
        super().__init__(in_dim, out_dim, kernel_size=3, padding=(0 if causal else 1, 1, 1), bias=bias)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x [B, C, T, H, W]."""
        return super().forward(F.pad(x, (0, 0, 0, 0, 2, 0)) if self.causal else x)


class Downsample(nn.Conv3d):
    """Convolution with kernel 4 and SAME zero padding. Odd padding has more in front, causal all."""

    stride: tuple[int, int, int]

    def __init__(self, in_dim: int, out_dim: int, stride: tuple[int, int, int], causal: bool = False) -> None:
        super().__init__(in_dim, out_dim, kernel_size=KERNEL, stride=stride, padding=(0 if causal else 1, 1, 1))
        self.causal = causal
        # Stride 2 needs padding (1, 1), stride 1 (2, 1). The convolution pads 1; ``front`` is the rest (last axis
        # first).
        self.front = [pad for s in reversed(stride) for pad in (2 - s, 0)]
        if causal:
            self.front[-2] = KERNEL - 1
        in_convolution = (1, 1, 1, 1, *((0, 0) if causal else (1, 1)))
        self.around = [sum(pads) for pads in zip(self.front, in_convolution, strict=True)]
        """The total padding, last axis first."""

    def forward(self, x: Tensor) -> Tensor:
        """Divides each axis of x [B, C, T, H, W] by its stride; causal frames 1 + n * s become 1 + n."""
        if is_on_gpu(x):
            return downsample_by_phases(F.pad(x, self.around), self.weight, self.bias, self.stride)
        return super().forward(F.pad(x, self.front) if any(self.front) else x)


class Upsample(nn.ConvTranspose3d):
    """Transposed convolution with kernel 4, the counterpart of ``Downsample``."""

    stride: tuple[int, int, int]

    def __init__(self, in_dim: int, out_dim: int, stride: tuple[int, int, int], causal: bool = False) -> None:
        super().__init__(in_dim, out_dim, kernel_size=KERNEL, stride=stride, padding=(0 if causal else 1, 1, 1))
        self.causal = causal

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Multiplies each axis of x [B, C, T, H, W] by its stride; causal frames 1 + n become 1 + n * s."""
        starts = [self.stride[0] - 1 if self.causal else 1, 1, 1]
        sizes = [length * s for length, s in zip(x.shape[2:], self.stride, strict=True)]
        if self.causal:
            sizes[0] -= self.stride[0] - 1
        if is_on_gpu(x):
            return _cropped(upsample_by_phases(x, self.weight, self.bias, self.stride), starts, sizes)
        if self.out_channels == COLOURS and not self.causal:
            return _UpsampleToColours.apply(x, self.weight, self.bias, self.stride)
        # The convolution itself crops the padding: 1, or 0 on a causal time axis. An axis of stride 1 comes out one too
        # long at its end, which is cropped here.
        return _cropped(super().forward(x), [starts[0] if self.causal else 0, 0, 0], sizes)


def is_on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU. The GPU forms of the convolutions are 1.5 to 2 times slower on a CPU."""
    return x.is_cuda


def _cropped(x: Tensor, starts: list[int], sizes: list[int]) -> Tensor:
    """The part of x [B, C, T, H, W] that begins at ``starts`` and has ``sizes``."""
    t, h, w = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return x[:, :, t, h, w]


def downsample_by_phases(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    """The convolution of `Downsample` as a convolution of stride 1 over space-to-depth, which uses a GPU's matrix
    units.

    cuDNN computes kernel 4 with stride 2 without matrix units, and 3 input channels do not fill one. With kernel index
    k = s * a + p, output o of an axis takes input s * (o + a) + p: tap a of phase p.

    Args:
        x: padded input, float [B, C, T, H, W]; a rest shorter than the stride at an axis' end is dropped.
        weight: float [O, C, 4, 4, 4].
        bias: float [O].
        stride: stride of each axis, 1 or 2.
    """
    phases = _channels_of_phases(x, stride)
    kernel = _split_kernel(weight, stride).permute(0, 3, 5, 7, 1, 2, 4, 6)  # [O, phases, C, taps]
    return F.conv3d(phases, kernel.flatten(1, 4), bias)


def upsample_by_phases(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    """The transposed convolution of `Upsample`, uncropped, as a convolution of stride 1 and depth-to-space.

    With output index s * i + k and kernel index k = s * a + p, every phase p of the outputs is a convolution of 4 / s
    taps a over the inputs i.

    Args:
        x: float [B, C, T, H, W].
        weight: float [C, O, 4, 4, 4].
        bias: float [O].
        stride: stride of each axis, 1 or 2.

    Returns:
        float [B, O, ...], with (length - 1) * stride + 4 values on each axis, as without padding.
    """
    split = _split_kernel(weight, stride)  # [C, O, taps and phases in turns]
    kernel = split.permute(3, 5, 7, 1, 0, 2, 4, 6).flip(5, 6, 7)  # [phases, O, C, taps]
    taps = kernel.shape[5:]
    repeated = None if bias is None else bias.repeat(math.prod(stride))
    y = F.conv3d(x, kernel.flatten(0, 3), repeated, padding=[tap - 1 for tap in taps])
    y = y.permute(0, 2, 3, 4, 1)  # [B, m_t, m_h, m_w, phases and channels], output s * m + p
    b, *sizes = y.shape[:4]
    y = y.reshape(b, *sizes, *stride, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    y = y.reshape(b, *(size * s for size, s in zip(sizes, stride, strict=True)), -1)
    return y.permute(0, 4, 1, 2, 3)


def _split_kernel(weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """A kernel [A, B, 4, 4, 4] as [A, B, taps, phases, taps, phases, taps, phases]: 4 / s taps, s phases per axis."""
    return weight.reshape(*weight.shape[:2], *(size for s in stride for size in (KERNEL // s, s)))


def _channels_of_phases(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Space-to-depth of x [B, C, T, H, W]: [B, phases * C, T / s, H / s, W / s], phases outermost."""
    t, h, w = (length // s for length, s in zip(x.shape[2:], stride, strict=True))
    st, sh, sw = stride
    blocks = x[:, :, : t * st, : h * sh, : w * sw].permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
    blocks = blocks.reshape(len(x), t, st, h, sh, w, sw, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return blocks.reshape(len(x), t, h, w, -1).permute(0, 4, 1, 2, 3)


class _UpsampleToColours(torch.autograd.Function):
    """``Upsample`` with an ordinary convolution as forward pass: 3 times as fast for 3 output channels on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        sizes = [length * s for length, s in zip(x.shape[2:], stride, strict=True)]
        return _cropped(upsample_by_phases(x, weight, bias, stride), [1, 1, 1], sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        extra = [2 - s for s in ctx.stride]  # values that `Upsample` crops from an axis of stride 1 have no gradient
        if any(extra):
            grad = F.pad(grad, [pad for size in reversed(extra) for pad in (0, size)])
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), [0], ctx.stride, [1] * 3, [1] * 3, True, [0] * 3, 1, [True, True, False]
        )
        return grad_x, grad_weight.to(weight.dtype), grad.sum((0, 2, 3, 4), dtype=weight.dtype), None
