"""The tokenizer's attention along the axes of a video's features.

B: batch   T, H, W: frames, height, width of the features   L: length of an axis   C: channels
N: heads   D: channels of a head, C // N
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AxialAttention"]

REACH = 16
"""Larger distances share one learned bias."""


class AxialAttention(nn.Module):
    """Sum of three multi-head attentions, along W, H and T (VideoGPT, arXiv 2104.10157; Ho et al., arXiv 1912.12180).

    Args:
        dim: channels C.
        num_heads: heads N of each of the three. Channels beyond a multiple of N are not used.
        causal: whether a frame attends to itself and earlier frames only.
        modern: learn a bias per distance along an axis (arXiv 1910.10683, section 2.1), and start with an output of
            zero.
    """

    def __init__(self, dim: int, num_heads: int, causal: bool = False, modern: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        width = dim // num_heads * num_heads
        self.qkv = nn.Linear(dim, 9 * width, bias=False)  # rows: axis (W, H, T), then q, k, v, then channels
        self.out = nn.Linear(3 * width, dim)
        self.bias = nn.Parameter(torch.zeros(3, num_heads, 2 * REACH + 1)) if modern else None
        nn.init.zeros_(self.out.bias)
        if modern:
            nn.init.zeros_(self.out.weight)
        else:
            # As three parallel layers with torch's default initialisation. With the published code's standard
            # deviation, width ** -0.5, this branch would be 45 times as large as the shortcut that it is added to.
            nn.init.uniform_(self.out.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of x [B, C, T, H, W] along each axis. Input and output have channels-last memory."""
        x = x.permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
        weights = zip(self.qkv.weight.chunk(3), self.out.weight.chunk(3, 1), strict=True)
        mixed: Tensor = self.out.bias
        for number, (qkv, out) in enumerate(weights):
            mixed = torch.addmm(mixed, self._along(x, qkv, number).flatten(0, -2), out.t())
        return mixed.view(x.shape).permute(0, 4, 1, 2, 3)

    def _along(self, x: Tensor, qkv: Tensor, number: int) -> Tensor:
        """Attention along W (number 0), H (1) or T (2), float [B, T, H, W, N * D].

        Args:
            x: [B, T, H, W, C].
            qkv: weights of queries, keys and values, [3 * N * D, C].
            number: number of the axis.
        """
        axis = 3 - number
        length, later = x.shape[axis], x.shape[axis + 1 : -1].numel()
        heads = F.linear(x, qkv).view(-1, length, later, 3, self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = heads.permute(3, 0, 2, 4, 1, 5)  # [axes before, axes after, N, L, D]
        # Axes are short: while L < D (published: 120) there are fewer scores than query values, and writing them out
        # beats every kernel for long sequences: 3 times faster with bfloat16 on a CPU, and faster on an H100 once
        # compiled.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.bias is not None:
            scores = scores + self._distance_bias(self.bias[number], length).to(scores.dtype)
        if self.causal and axis == 1:
            scores = scores.masked_fill(scores.new_ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        return (scores.softmax(-1) @ v).permute(0, 3, 1, 2, 4).reshape(*x.shape[:-1], -1)

    def _distance_bias(self, table: Tensor, length: int) -> Tensor:
        """The bias [N, L, L] of an axis' scores by distance, from a table [N, 2 * REACH + 1]."""
        places = torch.arange(length, device=table.device)
        distances = (places - places[:, None]).clamp(-REACH, REACH) + REACH
        return table[:, distances]
