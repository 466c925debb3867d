"""The attention layers of a prior: causal self-attention, and cross-attention to a condition.

B: batch   L: sequence length   C: channels
N: heads   M: heads of keys and values   D: channels of a head (C = N * D)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import PriorModelConfig
from clipmill.models.norms import scaled_to_unit
from clipmill.models.positions import rotate
from clipmill.models.strided import StridedMask

__all__ = ["CausalAttention", "CrossAttention", "KeysValues"]


class KeysValues(NamedTuple):
    """Keys and values, float [B, M, L, D] each. In `CrossAttention` values may have another number of channels."""

    keys: Tensor
    values: Tensor


class CausalAttention(nn.Module):
    """Causal multi-head self-attention; no mask is stored.

    Args:
        config: heads, attention dropout, and style. The modern style normalises queries and keys, applies rotary
            positions, and may have fewer heads M of keys and values (arXiv 2305.13245, 2302.05442).
    """

    def __init__(self, config: PriorModelConfig) -> None:
        super().__init__()
        dim, modern = config.hidden_dim, config.style == "modern"
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.dropout = config.attention_dropout
        """Dropout of the attention weights in training. Above 0, a CPU materialises the L x L scores."""
        self.qkv = nn.Linear(dim, (self.num_heads + 2 * self.num_kv_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=not modern)
        self.qk_gain = nn.Parameter(torch.ones(2, config.head_dim)) if modern else None
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        if self.out.bias is not None:
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, rotation: Tensor | None, mask: StridedMask | None = None) -> Tensor:
        """Self-attention of x [B, L, C] over the positions up to each.

        Args:
            x: input of the positions from the first on.
            rotation: rotary positions [2, L, D / 2]; None in the published style.
            mask: block-sparse layout; None attends to all earlier positions.
        """
        q, k, v = self._heads(x, rotation)
        if mask is not None:
            return self.out(mask(q, k, v).transpose(1, 2).flatten(2))
        grouped = self.num_kv_heads < self.num_heads
        # Only CUDA's half-precision kernels support grouped heads: others would materialise the L x L scores.
        if grouped and not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)):
            k, v = (heads.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for heads in (k, v))
            grouped = False
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, L, D], keys and values [B, M, L, D] of x [B, L, C]."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        # Heads stay next to their channels until the end, so that attention on CUDA writes its result in the order in
        # which the following projection reads it.
        q, k, v = self.qkv(x).unflatten(-1, (sum(heads), -1)).split(heads, -2)
        if self.qk_gain is not None:
            assert rotation is not None
            q, k = (scaled_to_unit(part, gain) for part, gain in zip((q, k), self.qk_gain.unbind(), strict=True))
            q, k = (rotate(part, rotation[:, :, None]) for part in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class CrossAttention(nn.Module):
    """Multi-head attention to the memory of a condition.

    Args:
        config: heads and style. In the published style, values keep about the width of the memory, M / N channels per
            head. In the modern style they have as many channels as queries and keys.
        memory_dim: channels M of the memory.
    """

    def __init__(self, config: PriorModelConfig, memory_dim: int) -> None:
        super().__init__()
        dim, modern = config.hidden_dim, config.style == "modern"
        self.num_heads = config.num_heads
        values_dim = dim if modern else max(1, memory_dim // self.num_heads) * self.num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(memory_dim, dim + values_dim, bias=False)
        self.out = nn.Linear(values_dim, dim, bias=not modern)
        nn.init.normal_(self.q.weight, std=dim**-0.5)
        nn.init.normal_(self.kv.weight, std=memory_dim**-0.5)
        nn.init.normal_(self.out.weight, std=(dim * config.num_layers) ** -0.5)
        if self.out.bias is not None:
            nn.init.zeros_(self.out.bias)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Keys and values of memory [B, S, M], float [B, N, S, channels of a head] each."""
        both = self.kv(memory).split((self.q.out_features, self.out.in_features), -1)
        return KeysValues(*(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in both))

    def forward(self, x: Tensor, seen: KeysValues) -> Tensor:
        """Attention of x [B, L, C] to the memory's keys and values -> [B, L, C]."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, *seen).transpose(1, 2).flatten(2))
