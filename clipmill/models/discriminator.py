"""A patch discriminator for videos, and its losses.

Patches: Isola et al., arXiv 1611.07004. For a VQ-VAE's reconstructions: Esser et al., arXiv 2012.09841. In 3D with
LeCam regularisation (Tseng et al., arXiv 2104.03310): Yu et al., arXiv 2212.05199.

B: batch   T, H, W: frames, height, width   C: channels
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.ranks import sum_over_ranks, world_size

__all__ = ["Judgement", "PatchDiscriminator"]

GROUPS = 8
SLOPE = 0.2
"""Negative slope of the leaky ReLUs."""
ANCHOR_DECAY = 0.99
"""Decay of the moving averages in the LeCam term."""


class Judgement(NamedTuple):
    """Result of comparing reconstructions with their originals."""

    realism: Tensor
    """Mean logit of the reconstructions, 0-d; its gradient reaches reconstructions and discriminator."""
    loss: Tensor
    """Hinge loss of the discriminator, 0-d."""
    lecam: Tensor
    """LeCam term, 0-d: squared distance of the logits to the moving average of the other side. It prevents
    overconfidence on small data sets.
    """


class PatchDiscriminator(nn.Module):
    """Classifies each patch of a video as real or reconstructed.

    Args:
        dim: channels after the first convolution; each later one doubles them. A multiple of 8.
        num_layers: convolutions with stride 2. A patch is about 2 ** (num_layers + 2) pixels wide.
    """

    anchors: Tensor

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [dim * 2**layer for layer in range(num_layers)]
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip([3, *widths], widths, strict=False)):
            layers.append(nn.Conv3d(before, width, 3, stride=2, padding=1))
            if index:
                layers.append(nn.GroupNorm(GROUPS, width))
            layers.append(nn.LeakyReLU(SLOPE))
        self.layers = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 3, padding=1))
        self.register_buffer("anchors", torch.zeros(2))  # mean logits of real videos, of reconstructions

    def forward(self, video: Tensor) -> Tensor:
        """Logits [B, 1, t, h, w] of a video [B, 3, T, H, W] in [-0.5, 0.5]: positive means real."""
        return self.layers(2 * video.contiguous(memory_format=torch.channels_last_3d))

    def judge(self, reconstruction: Tensor, video: Tensor) -> Judgement:
        """Compares reconstructions with their originals, and updates the moving averages.

        Args:
            reconstruction: float [B, 3, T, H, W]; the same B on every rank.
            video: originals of the same shape.
        """
        fake, real = self(torch.cat((reconstruction, video))).float().chunk(2)
        with torch.no_grad():
            means = sum_over_ranks(torch.stack((real.mean(), fake.mean()))) / world_size()
            self.anchors.lerp_(means, 1 - ANCHOR_DECAY)
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        lecam = (real - self.anchors[1]).square().mean() + (fake - self.anchors[0]).square().mean()
        return Judgement(fake.mean(), loss, lecam)
