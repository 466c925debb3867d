"""The two attentions: along the axes of a video's features, and causal over a sequence with a cache.

B: batch   T, H, W: frames, height, width of the features   L: sequence length   C: channels
N: heads   D: channels of a head (C = N * D)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AxialAttention", "CausalAttention"]


class AxialAttention(nn.Module):
    """Sum of three multi-head attentions, along W, H and T (VideoGPT, arXiv 2104.10157; Ho et al., arXiv 1912.12180).

    All three share two large products: one gives their queries, keys and values, one mixes their outputs
    (the sum of three linear layers is one linear layer of the concatenation).

    Args:
        dim: channels C.
        num_heads: heads N of each of the three.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 9 * dim, bias=False)  # rows: axis (W, H, T), then q, k, v, then channels
        self.out = nn.Linear(3 * dim, dim)
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.out.weight, std=dim**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes x [B, C, T, H, W] along each axis; channels-last memory in and out."""
        x = x.permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
        axes = zip((3, 2, 1), self.qkv.weight.chunk(3), strict=True)
        mixed = [self._along(F.linear(x, weight), axis) for axis, weight in axes]
        return self.out(torch.cat(mixed, -1)).permute(0, 4, 1, 2, 3)

    def _along(self, qkv: Tensor, axis: int) -> Tensor:
        """Attention along one axis of qkv [B, T, H, W, 3 * C] -> [B, T, H, W, C]."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).movedim(axis, -2).movedim(3, 0)
        others = qkv.shape[1:4]  # B and the two other axes
        # One copy for all three, where flattening their strided views would copy each.
        q, k, v = qkv.flatten(1, 3).contiguous().unbind(0)  # each [batch, N, length, D]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.unflatten(0, others).movedim(-2, axis).flatten(-2)


class CausalAttention(nn.Module):
    """Multi-head self-attention over the positions so far; no mask is ever stored.

    Args:
        dim: channels C.
        num_heads: heads N.
        dropout: on the attention weights, in training. Above 0 a CPU materialises the L x L scores.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes x [B, L, C] over the positions up to each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, N, L, D]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """One position: x [B, C] -> [B, C]; writes its key and value into the cache [B, N, L, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [B, N, D]
        keys[:, :, position] = k
        values[:, :, position] = v
        mixed = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, : position + 1], values[:, :, : position + 1])
        return self.out(mixed.flatten(1))
