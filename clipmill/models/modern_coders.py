"""Encoder and decoder of the style ``modern``: the signal reaches every layer from the first step.

Every change of resolution has a shortcut without parameters (DC-AE: Chen et al., arXiv 2410.10733, section 3.1),
attention has its own residual branch, and all branches start at zero. The published layout has no shortcut around its
strided convolutions, and needs hundreds of steps until a signal passes them.

B: batch   T, H, W: frames, height, width   t, h, w: those of the latents   C: channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import VQVAEModelConfig
from clipmill.models.axial import AxialAttention
from clipmill.models.coders import halvings, norm
from clipmill.models.convolutions import Downsample, Pointwise, SameConv3d, Upsample

__all__ = ["ModernDecoder", "ModernEncoder"]


class ModernBlock(nn.Module):
    """x + [norm, ReLU, conv 3 to half the channels, norm, ReLU, conv 1 back], then + [norm, axial attention]."""

    def __init__(self, config: VQVAEModelConfig, dim: int) -> None:
        super().__init__()
        last = Pointwise(dim // 2, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.convolutions = nn.Sequential(
            norm(config, dim),
            nn.ReLU(inplace=True),
            SameConv3d(dim, dim // 2, bias=False, causal=config.causal),
            norm(config, dim // 2),
            nn.ReLU(inplace=True),
            last,
        )
        self.attention = None
        if config.axial_attention:
            attention = AxialAttention(dim, config.num_heads, config.causal, modern=True)
            self.attention = nn.Sequential(norm(config, dim), attention)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to x [B, C, T, H, W]."""
        x = x + self.convolutions(x)
        return x if self.attention is None else x + self.attention(x)


class ModernEncoder(nn.Module):
    """Video [B, 3, T, H, W] -> features [B, C, t, h, w], C = ``hidden_dim``."""

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim, strides = config.hidden_dim, halvings(config.downsample)
        self.shrink = nn.ModuleList(
            Downsample(dim if level else 3, dim, stride, config.causal) for level, stride in enumerate(strides)
        )
        self.last = SameConv3d(dim, dim, causal=config.causal)
        blocks = [ModernBlock(config, dim) for _ in range(config.num_res_layers)]
        self.stack = nn.Sequential(*blocks, norm(config, dim), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Encodes x [B, 3, T, H, W]."""
        for level, conv in enumerate(self.shrink):
            x = conv(F.relu(x)) + _averaged(x, conv) if level else conv(x)
        return self.stack(x + self.last(F.relu(x)))


class ModernDecoder(nn.Module):
    """Features [B, C, t, h, w] -> video [B, 3, T, H, W], C = ``decoder_width``."""

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim, strides = config.decoder_width, halvings(config.downsample)
        last = len(strides) - 1
        self.stack = nn.Sequential(*(ModernBlock(config, dim) for _ in range(config.num_res_layers)))
        self.grow = nn.ModuleList(
            Upsample(dim, dim if level < last else 3, stride, config.causal) for level, stride in enumerate(strides)
        )
        self.before_last = nn.Sequential(norm(config, dim), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Decodes x [B, C, t, h, w]."""
        x = self.stack(x)
        for conv in self.grow[:-1]:
            x = conv(F.relu(x)) + _repeated(x, conv)
        return self.grow[-1](self.before_last(x))


def _averaged(x: Tensor, conv: nn.Module) -> Tensor:
    """Means over the inputs of each output of ``conv``, [B, C, t, h, w]; if causal, frame 0 is its own mean."""
    assert isinstance(conv, Downsample)
    if conv.causal:
        x = torch.cat((x[:, :, :1].expand(-1, -1, conv.stride[0] - 1, -1, -1), x), 2)
    return F.avg_pool3d(x, conv.stride).contiguous(memory_format=torch.channels_last_3d)


def _repeated(x: Tensor, conv: nn.Module) -> Tensor:
    """The counterpart of `_averaged`: repeats each value at all outputs of ``conv`` that belong to it."""
    assert isinstance(conv, Upsample)
    grown = F.interpolate(x, scale_factor=tuple(map(float, conv.stride)), mode="nearest")
    return grown[:, :, conv.stride[0] - 1 :] if conv.causal else grown
