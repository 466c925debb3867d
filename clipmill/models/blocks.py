"""The blocks of a prior: norm, attention, add; norm, cross-attention, add (with a condition); norm, MLP, add.

B: batch   L: positions   C: channels   S, M: length and channels of the condition that the prior attends to
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import PriorModelConfig
from clipmill.models.attention import CausalAttention, CrossAttention
from clipmill.models.norms import Norm, layer_norm, rms_norm
from clipmill.models.strided import StridedMask

__all__ = ["Block", "norms_per_block"]


def norms_per_block(config: PriorModelConfig) -> int:
    """Norms of each block."""
    return 3 if config.attends else 2


class Block(nn.Module):
    """One layer of the transformer, in the style that the config names.

    Args:
        config: config of the prior.
        memory_dim: M; None without cross-attention.
    """

    def __init__(self, config: PriorModelConfig, memory_dim: int | None) -> None:
        super().__init__()
        dim, width = config.hidden_dim, config.mlp_width
        self.modern = config.style == "modern"
        self.normalise = rms_norm if self.modern else layer_norm
        self.attention = CausalAttention(config)
        self.up_projection = nn.Linear(dim, 2 * width if self.modern else width, bias=not self.modern)
        self.down_projection = nn.Linear(width, dim, bias=not self.modern)
        self.dropout = config.dropout
        self.cross = None if memory_dim is None else CrossAttention(config, memory_dim)
        nn.init.normal_(self.attention.out.weight, std=(dim * config.num_layers) ** -0.5)
        if self.modern:
            nn.init.normal_(self.up_projection.weight, std=dim**-0.5)
            nn.init.normal_(self.down_projection.weight, std=(width * config.num_layers) ** -0.5)

    def forward(
        self,
        x: Tensor,
        norms: list[Norm],
        rotation: Tensor | None,
        memory: Tensor | None,
        mask: StridedMask | None,
    ) -> Tensor:
        """Transforms x [B, L, C].

        Args:
            x: input of the positions from the first on.
            norms: the norms of this block.
            rotation: see `CausalAttention.forward`.
            memory: the condition that the block attends to, float [B, S, M]; None without cross-attention.
            mask: see `CausalAttention.forward`.
        """
        x = x + self._drop(self.attention(self.normalise(x, norms[0]), rotation, mask))
        if self.cross is not None:
            assert memory is not None
            x = x + self._drop(self.cross(self.normalise(x, norms[1]), self.cross.keys_values(memory)))
        return x + self._drop(self.mlp(self.normalise(x, norms[-1])))

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU (arXiv 2002.05202), or the published quick-GELU network, x * sigmoid(1.702 x) between its layers;
        x [..., C] -> [..., C].
        """
        if self.modern:
            gate, value = self.up_projection(x).chunk(2, -1)
            return self.down_projection(F.silu(gate) * value)
        # silu(a x) / a is the same function with one tensor saved for the backward pass instead of two.
        return self.down_projection(F.silu(self.up_projection(x) * 1.702) * (1 / 1.702))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
