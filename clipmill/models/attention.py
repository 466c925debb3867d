"""The two attentions: along the axes of a video's features, and causal over a sequence with a cache.

B: batch   T, H, W: frames, height, width of the features   L: sequence length   C: channels
N: heads   D: channels of a head (C = N * D)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AxialAttention", "CausalAttention"]

SHORT_AXIS = 32
"""On a CPU two explicit products beat the fused attention up to about this length: 1.4 times at 16, 1.8 at 4."""


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
        qkv = self.qkv(x).unflatten(-1, (3, 3, self.num_heads, -1))  # [B, T, H, W, axis, qkv, N, D]
        mixed = [self._along(qkv[..., index, :, :, :], axis) for index, axis in enumerate((3, 2, 1))]
        return self.out(torch.cat(mixed, -1)).permute(0, 4, 1, 2, 3)

    def _along(self, qkv: Tensor, axis: int) -> Tensor:
        """Attention along one axis of qkv [B, T, H, W, 3, N, D] -> [B, T, H, W, C]."""
        q, k, v = qkv.movedim(axis, -2).unbind(3)  # each [B, two other axes, N, length, D]
        if q.device.type == "cpu" and q.shape[-2] <= SHORT_AXIS:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = _scaled_dot_product(q, k, v)
        return mixed.movedim(-2, axis).flatten(-2)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused attention wants exactly one batch axis before the heads."""
    mixed = F.scaled_dot_product_attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4))
    return mixed.unflatten(0, q.shape[:-3])


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
