"""The norms of a prior. Gain and bias may depend on the class of the clip, and on the condition of a latent frame.

One table holds the gains and biases of all norms of the model. So conditioning costs one look-up per step and one
parameter tensor for any number of layers; optimizers that shard by tensor have a cost per tensor.

B: batch   C: channels   L: positions   t: latent frames
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Norm", "Norms", "layer_norm", "rms_norm", "scaled_to_unit", "standardised"]

EPS = 1e-8
"""Added to the variance. Embeddings start with variance 1e-4, so 1e-6 would change the logits of imported weights by
2e-4.
"""
PUBLISHED_EPS = 1e-5
"""The published norm adds this to 1 / std. Without it, logits of imported weights would change by 1e-5 times the
standard deviation of the norm's input.
"""


class Norm(NamedTuple):
    """Gain and bias of one norm; a bias of None adds nothing.

    [C] if all samples share them, [B, C] if they depend on the class, [B, t, C] if latent frames differ.
    """

    gain: Tensor
    bias: Tensor | None


class Norms(nn.Module):
    """Gains and biases of all norms of a model (VideoGPT, arXiv 2104.10157, appendix).

    Unconditional: ``gain = 1 + table[0]``. With classes: ``gain = 1 + W.onehot`` and ``bias = Wb.onehot``, which are
    rows of the table. With ``null_class``, a further row means no class.

    Args:
        num_norms: norms in the model.
        dim: channels C.
        num_classes: 0 for an unconditional model.
        null_class: whether label ``num_classes`` is allowed, and means no class.
        with_bias: whether norms have a bias; norms that depend on a class always have one.
    """

    def __init__(self, num_norms: int, dim: int, num_classes: int, *, null_class: bool, with_bias: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        parts = 2 if with_bias or num_classes else 1
        self.table = nn.Parameter(torch.zeros(max(1, num_classes + null_class), num_norms, parts, dim))

    def forward(self, label: Tensor | None, frame_offsets: Tensor | None = None) -> list[Norm]:
        """The norms in the order of their use.

        Args:
            label: class of each sample, int64 [B]; None for an unconditional model.
            frame_offsets: offsets of gains and biases per latent frame, float [B, t, num_norms, 2, C]; None without.
        """
        if (label is None) == bool(self.num_classes):
            raise ValueError(f"a prior of {self.num_classes} classes got {'no' if label is None else 'a'} label")
        offsets = self.table[0] if label is None else self.table[label]  # [..., num_norms, 1 or 2, C]
        if frame_offsets is not None:
            offsets = frame_offsets + (offsets if label is None else offsets[:, None])
        parts = [norm.unbind(-2) for norm in offsets.unbind(-3)]
        return [Norm(1 + gain, bias[0] if bias else None) for gain, *bias in parts]


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """The published layer norm (see `standardised`) of x [B, L, C] or [B, C], then gain and bias.

    L is a multiple of the norm's number of latent frames, if it has any. For x [B, C] that number is one.
    """
    if norm.gain.dim() == 1 and norm.bias is not None:
        return standardised(x, norm.gain) + norm.bias
    return _modulated(standardised(x), norm)


def standardised(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """``(x - mean) * (1 / std + 1e-5)`` over the channels of x [..., C], then ``gain`` [C] (VideoGPT's published code).

    The gradient treats 1e-5 * std as a constant, so its component along x has a relative error of that size.
    """
    y, _, inverse_std = torch.native_layer_norm(x, x.shape[-1:], gain, None, EPS)
    return torch.addcdiv(y, y, inverse_std.to(y.dtype), value=PUBLISHED_EPS)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """RMS norm (arXiv 1910.07467), then gain and, if set, bias; shapes as for `layer_norm`."""
    if norm.bias is None:
        return scaled_to_unit(x, norm.gain)
    return _modulated(scaled_to_unit(x, None), norm)


def scaled_to_unit(x: Tensor, gain: Tensor | None) -> Tensor:
    """Scales x [..., D] to a mean square of one, then by gain [D]. Computes in float32; returns the dtype of x."""
    if x.device.type == "cpu":
        return _ScaledToUnit.apply(x, gain)
    y = F.rms_norm(x, x.shape[-1:], eps=EPS)
    return y if gain is None else (y * gain).to(x.dtype)  # a gain in bfloat16 would change in steps of 1/128


class _ScaledToUnit(torch.autograd.Function):
    """`scaled_to_unit` on a CPU, where torch's composition would keep several float32 copies of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None) -> Tensor:
        inverse = x.float().square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        y = x * inverse
        return (y if gain is None else y * gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, gain, inverse = ctx.saved_tensors
        unit = x * inverse
        grad_gain = None
        if gain is not None:
            grad_gain = (grad * unit).flatten(0, -2).sum(0).to(gain.dtype)
            grad = grad * gain
        grad_x = (grad - unit * (grad * unit).mean(-1, keepdim=True)) * inverse
        return grad_x.to(x.dtype), grad_gain


def _modulated(x: Tensor, norm: Norm) -> Tensor:
    gain, bias = norm
    assert bias is not None  # a conditional norm has one
    if gain.dim() == 3:
        x = x.unflatten(1, (gain.shape[1], -1))
        return torch.addcmul(bias[:, :, None], x, gain[:, :, None]).flatten(1, 2)
    if x.dim() == 3 and gain.dim() == 2:
        gain, bias = gain[:, None], bias[:, None]
    return torch.addcmul(bias, x, gain)
