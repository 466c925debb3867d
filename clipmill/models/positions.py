"""Positions of codes: learned embeddings for each axis, or rotations of queries and keys.

t, h, w: latent frames, height, width   L: points of the grid (with a codebook axis if there are several), raster order
C: channels   D: channels of a head
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["axial_tables", "raster", "rotate", "rotations"]


def axial_tables(shape: tuple[int, ...], dim: int) -> nn.ParameterList:
    """Learned positions of a grid: one embedding [length, about C / axes] per axis (VideoGPT, section 3.2).

    If the number of axes does not divide C (as for the paper's 512 and 1024 with three axes), the first axes get one
    channel more.
    """
    num_axes = len(shape)
    widths = [dim // num_axes + (axis < dim % num_axes) for axis in range(num_axes)]
    return nn.ParameterList(torch.randn(length, width) * 0.01 for length, width in zip(shape, widths, strict=True))


def raster(tables: nn.ParameterList) -> Tensor:
    """Concatenates the axes' embeddings for each point of the grid, float [L, C]."""
    shape = [len(table) for table in tables]
    spread = []
    for axis, table in enumerate(tables):
        broadcast = [1] * len(shape)
        broadcast[axis] = shape[axis]
        spread.append(table.view(*broadcast, -1).expand(*shape, -1))
    return torch.cat(spread, -1).flatten(0, -2)


def rotations(shape: tuple[int, ...], head_dim: int, base: float) -> Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864) on a grid, float32 [2, L, D / 2].

    Pair i of a head's channels is rotated by the position on axis i mod (number of axes) times base ** (-2 i / D). Axes
    are interleaved over the frequencies, so each of them has the whole range.

    Args:
        shape: (t, h, w), or (t, h, w, M) with several codebooks.
        head_dim: D, even.
        base: wavelengths range from 2 pi to 2 pi * base.
    """
    pairs = torch.arange(head_dim // 2)
    frequencies = base ** (-2 * pairs.double() / head_dim)
    places = torch.cartesian_prod(*(torch.arange(length) for length in shape)).view(math.prod(shape), len(shape))
    angles = places[:, pairs % len(shape)] * frequencies  # [L, D / 2]
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D / 2) of x [..., D] by ``rotation`` [2, ..., D / 2], which broadcasts to x."""
    cos, sin = rotation
    left, right = x.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)
