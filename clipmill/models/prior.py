"""The prior: a transformer that draws the codes of a clip one after another.

VideoGPT (arXiv 2104.10157, section 3.2), in the layout of its published code: a code enters as its
codebook vector, position p sees the codes before p, positions are learned per axis, blocks are pre-norm.

B: batch   t, h, w: latent frames, height, width   L = t * h * w, raster order   K: codes   C: hidden channels
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipmill.config import PriorModelConfig
from clipmill.errors import UserError
from clipmill.models.attention import CausalAttention
from clipmill.models.conditioning import Norm, Norms, normalise

__all__ = ["Cache", "Prior"]

CHUNK_LOGITS = 2**26
"""Logits held at once by the loss (float32: 256 MiB)."""


class CodeInput(nn.Module):
    """Embeds the codes before each position: codebook vector, linear layer, right shift, axial positions.

    Args:
        dim: hidden channels C, of which each axis takes a third (the paper's 512 and 1024 leave a remainder: t, then h,
            take one channel more).
        latent_shape: (t, h, w).
        codebook: float [K, D]; state, since without it a prior cannot be used.
    """

    codebook: Tensor

    def __init__(self, dim: int, latent_shape: tuple[int, int, int], codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook.detach().clone())
        self.project = nn.Linear(codebook.shape[1], dim, bias=False)
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        widths = [dim // 3 + (axis < dim % 3) for axis in range(3)]
        shapes = zip(latent_shape, widths, strict=True)
        self.axes = nn.ParameterList(torch.randn(length, width) * 0.01 for length, width in shapes)
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Embeds codes int64 [B, L] as float [B, L, C]; position p holds the code at p - 1."""
        # K projected codebook rows, not B * L: the look-up comes after the product.
        before = F.embedding(codes[:, :-1], self.project(self.codebook))
        start = self.start.to(before.dtype).expand(len(codes), 1, -1)
        return torch.cat((start, before), 1) + self.positions()

    def positions(self) -> Tensor:
        """Position embeddings, float [L, C]: thirds for t, h and w."""
        t, h, w = self.axes
        shape = (len(t), len(h), len(w), -1)
        thirds = t[:, None, None].expand(shape), h[None, :, None].expand(shape), w[None, None].expand(shape)
        return torch.cat(thirds, -1).flatten(0, 2)


class Block(nn.Module):
    """Norm, attention, dropout, add; norm, MLP, dropout, add."""

    def __init__(self, config: PriorModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.attention = CausalAttention(dim, config.num_heads, config.attention_dropout)
        self.widen = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        self.dropout = config.dropout
        nn.init.normal_(self.attention.out.weight, std=(dim * config.num_layers) ** -0.5)

    def forward(self, x: Tensor, attention_norm: Norm, mlp_norm: Norm) -> Tensor:
        """Transforms x [B, L, C]."""
        x = x + F.dropout(self.attention(normalise(x, attention_norm)), self.dropout, self.training)
        return x + F.dropout(self.mlp(normalise(x, mlp_norm)), self.dropout, self.training)

    def mlp(self, x: Tensor) -> Tensor:
        """The quick-GELU network, x * sigmoid(1.702 x) between its layers; x [..., C] -> [..., C]."""
        # silu(a x) / a is the same function with one tensor saved for the backward pass instead of two.
        return self.narrow(F.silu(self.widen(x) * 1.702) * (1 / 1.702))

    def step(self, x: Tensor, norms: tuple[Norm, Norm], keys: Tensor, values: Tensor, position: int) -> Tensor:
        """One position, x [B, C] -> [B, C], with this block's caches [B, N, L, D]."""
        x = x + self.attention.step(normalise(x, norms[0]), keys, values, position)
        return x + self.mlp(normalise(x, norms[1]))


class Cache:
    """What ``Prior.step`` keeps between positions; made by ``Prior.new_cache``.

    Attributes:
        keys: float [layers, B, N, L, D].
        values: the same of the values.
        norms: gains and biases of the samples' classes.
        inputs: projected codebook, float [K, C].
        positions: float [L, C], the first with the start vector added.
        position: the next position, 0 .. L.
    """

    def __init__(self, prior: Prior, batch_size: int, label: Tensor | None) -> None:
        config, code_input = prior.config, prior.input
        inputs = code_input.project(code_input.codebook)
        heads = (config.num_heads, prior.num_positions, config.hidden_dim // config.num_heads)
        self.keys = inputs.new_empty(config.num_layers, batch_size, *heads)
        self.values = torch.empty_like(self.keys)
        self.norms = prior.norms(label)
        self.inputs = inputs
        self.positions = code_input.positions()
        self.positions[0] += code_input.start
        self.position = 0


class Prior(nn.Module):
    """Distribution over the codes of a clip, one position after another.

    Args:
        config: sizes and dropout.
        latent_shape: (t, h, w) of the codes.
        num_codes: K.
        codebook: the tokenizer's embeddings, float [K, D].
        num_classes: classes of the data; used when ``config.class_conditional``.

    Raises:
        UserError: there are no classes to condition on.
    """

    def __init__(
        self,
        config: PriorModelConfig,
        latent_shape: tuple[int, int, int],
        num_codes: int,
        codebook: Tensor,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if config.class_conditional and num_classes < 1:
            raise UserError(
                "prior.model.class_conditional needs labelled clips, and these have none; "
                "set data.source.label=parent_folder and shard again, or class_conditional=false"
            )
        if len(codebook) != num_codes:
            raise ValueError(f"a codebook of {len(codebook)} rows for {num_codes} codes")
        self.config = config
        self.latent_shape = latent_shape
        self.num_codes = num_codes
        self.num_positions = math.prod(latent_shape)
        self.input = CodeInput(config.hidden_dim, latent_shape, codebook)
        self.norms = Norms(2 * config.num_layers + 1, config.hidden_dim, num_classes * config.class_conditional)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.hidden_dim, num_codes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits of each code given those before it.

        Args:
            codes: int64 [B, t, h, w].
            label: class of each clip, int64 [B]; none for an unconditional prior.

        Returns:
            Float [B, L, K].
        """
        return self.head(self._hidden(codes, label))

    def loss(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each clip's codes in nats per code, float32 [B]; arguments as of ``forward``."""
        hidden = self._hidden(codes, label).flatten(0, 1)
        targets = codes.flatten()
        rows_per_chunk = max(1, CHUNK_LOGITS // self.num_codes)
        if len(targets) <= rows_per_chunk:
            losses = self._cross_entropy(hidden, targets)
        else:
            # Logits far larger than the model's activations: a chunk at a time, made again for the gradient.
            chunks = zip(hidden.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
            losses = torch.cat([checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])
        return losses.view(len(codes), -1).mean(1)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Float32 [N] from hidden [N, C] and targets int64 [N]."""
        return F.cross_entropy(self.head(hidden).float(), targets, reduction="none")

    def _hidden(self, codes: Tensor, label: Tensor | None) -> Tensor:
        """What the head reads, float [B, L, C]."""
        norms = self.norms(label)
        x = self.input(codes.flatten(1))
        for index, block in enumerate(self.blocks):
            x = block(x, norms[2 * index], norms[2 * index + 1])
        return normalise(x, norms[-1])

    def new_cache(self, batch_size: int, label: Tensor | None = None) -> Cache:
        """Room for the keys and values of a whole batch; call without gradients, in eval mode.

        Args:
            batch_size: B.
            label: int64 [B]; none for an unconditional prior.
        """
        return Cache(self, batch_size, label)

    def step(self, cache: Cache, previous: Tensor | None) -> Tensor:
        """Logits of the next position, float [B, K].

        Args:
            cache: advances by one position.
            previous: the codes drawn at the position before, int64 [B]; none at the first.
        """
        position = cache.position
        x = cache.positions[position].expand(cache.keys.shape[1], -1)
        if previous is not None:
            x = x + F.embedding(previous, cache.inputs)
        for index, block in enumerate(self.blocks):
            norms = cache.norms[2 * index], cache.norms[2 * index + 1]
            x = cast(Block, block).step(x, norms, cache.keys[index], cache.values[index], position)
        cache.position += 1
        return self.head(normalise(x, cache.norms[-1]))
