"""A 3D ResNet-34 over a few raw frames (He et al., arXiv 1512.03385; VideoGPT, arXiv 2104.10157, section 3.2).

It is laid out as in VideoGPT's public code: each of the four groups starts with a projection, and a block's residual
branch ends with a ReLU.

B: batch   C: channels   T, H, W: frames, height, width   h, w: ceil(H / 4), ceil(W / 4)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BLOCKS", "FrameEncoder"]

WIDTHS = (64, 128, 256)
BLOCKS = (3, 4, 6, 3)
"""Blocks of each group."""
STRIDES = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 1, 1))


class FrameEncoder(nn.Module):
    """Features of frames at a quarter of their height and width.

    Args:
        dim: channels of the features (published: 240).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, WIDTHS[0], 3, padding=1, bias=False), _ChannelNorm(WIDTHS[0]), nn.ReLU())
        blocks = []
        width = WIDTHS[0]
        for out_width, count, stride in zip((*WIDTHS, dim), BLOCKS, STRIDES, strict=True):
            for index in range(count):
                blocks.append(_Block(width, out_width, stride) if index == 0 else _Block(width))
                width = out_width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W] -> features [B, T, h, w, C]."""
        return self.blocks(self.stem(frames)).permute(0, 2, 3, 4, 1)


class _Block(nn.Module):
    """Two convolutions with a shortcut.

    Args:
        dim: channels of the input.
        out_dim: channels of the output, with a projection as shortcut; None keeps the shape, with an identity shortcut.
        stride: stride of the first convolution and of the projection.
    """

    def __init__(self, dim: int, out_dim: int | None = None, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if out_dim is not None:
            self.shortcut = nn.Sequential(nn.Conv3d(dim, out_dim, 1, stride=stride, bias=False), _ChannelNorm(out_dim))
        width = out_dim or dim
        self.body = nn.Sequential(
            nn.Conv3d(dim, width, 3, stride=stride, padding=1, bias=False),
            _ChannelNorm(width),
            nn.ReLU(),
            nn.Conv3d(width, width, 3, padding=1, bias=False),
            _ChannelNorm(width),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, T, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
