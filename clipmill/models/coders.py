"""Encoder and decoder of the published tokenizer (VideoGPT, arXiv 2104.10157, section 3.1), laid out as in its code.

B: batch   T, H, W: frames, height, width   t, h, w: those of the latents   C: hidden channels
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import VQVAEModelConfig
from clipmill.models.axial import AxialAttention
from clipmill.models.convolutions import Downsample, Pointwise, SameConv3d, Upsample, is_on_gpu
from clipmill.models.ranks import GlobalBatchNorm

__all__ = ["Decoder", "Encoder", "GroupNorm", "halvings"]

MOST_GROUPS = 32


def halvings(downsample: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Strides of the downsampling convolutions, first to last: 2 on each axis that is not yet small enough."""
    powers = [factor.bit_length() - 1 for factor in downsample]
    t, h, w = ([2] * power + [1] * (max(powers) - power) for power in powers)
    return list(zip(t, h, w, strict=True))


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He, arXiv 1803.08494) with statistics per clip, or per frame."""

    def __init__(self, dim: int, each_frame: bool) -> None:
        super().__init__(math.gcd(dim, MOST_GROUPS), dim)
        self.each_frame = each_frame

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [B, C, T, H, W]; channels-last memory in and out."""
        if is_on_gpu(x):
            return self._by_channels(x)
        if not self.each_frame:
            return super().forward(x)
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))  # [B * T, C, H, W]
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)

    def _by_channels(self, x: Tensor) -> Tensor:
        """Group norm in channels-last memory, which torch's own leaves on CUDA. It compiles to one kernel."""
        rows = x.permute(0, 2, 3, 4, 1).unflatten(-1, (self.num_groups, -1))  # [B, T, H, W, groups, channels of one]
        axes = (2, 3, 5) if self.each_frame else (1, 2, 3, 5)
        var, mean = torch.var_mean(rows.float(), axes, correction=0, keepdim=True)
        normal = ((rows - mean) * torch.rsqrt(var + self.eps)).flatten(-2)
        return (normal * self.weight + self.bias).to(x.dtype).permute(0, 4, 1, 2, 3)


def norm(config: VQVAEModelConfig, dim: int) -> nn.Module:
    """The configured norm of [B, C, T, H, W]."""
    return GlobalBatchNorm(dim) if config.norm == "batch" else GroupNorm(dim, each_frame=config.causal)


class ResidualBlock(nn.Module):
    """x + [norm, ReLU, conv 3 to half the channels, norm, ReLU, conv 1 back, norm, ReLU, axial attention].

    Without axial attention the block ends with the second convolution.
    """

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        layers: list[nn.Module] = [
            norm(config, dim),
            nn.ReLU(inplace=True),
            SameConv3d(dim, dim // 2, bias=False, causal=config.causal),
            norm(config, dim // 2),
            nn.ReLU(inplace=True),
            Pointwise(dim // 2, dim, bias=False),
        ]
        if config.axial_attention:
            layers += [norm(config, dim), nn.ReLU(inplace=True), AxialAttention(dim, config.num_heads, config.causal)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to x [B, C, T, H, W]."""
        return x + self.layers(x)


def residual_stack(config: VQVAEModelConfig) -> nn.Sequential:
    """The residual blocks, then norm and ReLU."""
    blocks = [ResidualBlock(config) for _ in range(config.num_res_layers)]
    return nn.Sequential(*blocks, norm(config, config.hidden_dim), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """Video [B, 3, T, H, W] -> features [B, C, t, h, w]."""

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        strides = halvings(config.downsample)
        self.shrink = nn.ModuleList(
            Downsample(3 if i == 0 else dim, dim, stride, config.causal) for i, stride in enumerate(strides)
        )
        self.last = SameConv3d(dim, dim, causal=config.causal)
        self.stack = residual_stack(config)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes x [B, 3, T, H, W]."""
        for conv in self.shrink:
            x = F.relu(conv(x), inplace=True)
        return self.stack(self.last(x))


class Decoder(nn.Module):
    """Features [B, C, t, h, w] -> video [B, 3, T, H, W]."""

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        strides = halvings(config.downsample)
        last = len(strides) - 1
        self.stack = residual_stack(config)
        self.grow = nn.ModuleList(
            Upsample(dim, 3 if i == last else dim, stride, config.causal) for i, stride in enumerate(strides)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Decodes x [B, C, t, h, w]."""
        x = self.stack(x)
        for conv in self.grow[:-1]:
            x = F.relu(conv(x), inplace=True)
        return self.grow[-1](x)
