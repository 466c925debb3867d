"""How a prior learns of what it should make: layer norms whose gain and bias depend on the class.

One table holds the gains and biases of every norm of the model, so conditioning costs one look-up a step
and one parameter tensor, however many layers (optimizers that shard by tensor pay for each).

B: batch   C: channels   L: positions
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Norm", "Norms", "normalise"]

EPS = 1e-8
"""Added to the variance. The published norm has its 1e-5 outside the root; embeddings start so small (variance
1e-4) that an eps of 1e-6 would change the logits of imported weights by 2e-4."""


class Norm(NamedTuple):
    """Gain and bias of one layer norm: [C] for every sample alike, or [B, C] for a class each."""

    gain: Tensor
    bias: Tensor


class Norms(nn.Module):
    """Gains and biases of all layer norms of a model (VideoGPT, arXiv 2104.10157, appendix).

    Unconditional, ``gain = 1 + table[0]``; for classes, ``gain = 1 + W.onehot``, ``bias = Wb.onehot``, which
    are rows of the table.

    Args:
        num_norms: norms in the model.
        dim: channels C.
        num_classes: 0 for an unconditional model.
    """

    def __init__(self, num_norms: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Parameter(torch.zeros(max(1, num_classes), num_norms, 2, dim))

    def forward(self, label: Tensor | None) -> list[Norm]:
        """The norms in the order of their use.

        Args:
            label: class of each sample, int64 [B]; none for an unconditional model.
        """
        if (label is None) == bool(self.num_classes):
            raise ValueError(f"a prior of {self.num_classes} classes got {'no' if label is None else 'a'} label")
        offsets = self.table[0] if label is None else self.table[label]  # [..., num_norms, 2, C]
        return [Norm(1 + gain, bias) for gain, bias in (norm.unbind(-2) for norm in offsets.unbind(-3))]


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """Layer norm over the channels of x [B, L, C] or [B, C], then gain and bias."""
    gain, bias = norm
    if gain.dim() == 1:
        return F.layer_norm(x, gain.shape, gain, bias, EPS)
    if x.dim() == 3:
        gain, bias = gain[:, None], bias[:, None]
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=EPS), gain)
