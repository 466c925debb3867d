"""A plain implementation of the published transformer (VideoGPT, arXiv 2104.10157), with which benchmarks compare."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipmill.config import PriorModelConfig
from clipmill.models.positions import axial_tables, raster


class PlainNorm(nn.Module):
    """The published norm, its epsilon outside the root."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x.float() - x.float().mean(-1, keepdim=True)
        normal = centred * (1e-5 + centred.square().mean(-1, keepdim=True).rsqrt())
        return (normal * self.gain + self.bias).type_as(x)


class PlainBlock(nn.Module):
    """A block as the published code computes it."""

    def __init__(self, dim: int, num_heads: int, length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(PlainNorm(dim) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.up_projection, self.down_projection = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.register_buffer("mask", torch.ones(length, length).tril())

    def forward(self, x: Tensor) -> Tensor:
        """All positions of x [B, L, C] at once."""
        return self.mix(x, *self.heads(x), self.mask)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, float [B, N, L, D] each, of x [B, L, C]."""
        y = self.norms[0](x)
        return tuple(part(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The block's output for x, whose queries see the keys where the mask is not 0."""
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(mask == 0, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = self.up_projection(self.norms[1](x))
        return x + self.down_projection(y * torch.sigmoid(1.702 * y))


class PublishedPrior(nn.Module):
    """The unconditional prior with its released start; every block is recomputed in the backward pass, as there."""

    def __init__(
        self, config: PriorModelConfig, latent_shape: tuple[int, ...], num_codes: int, codebook: Tensor
    ) -> None:
        super().__init__()
        dim, length = config.hidden_dim, math.prod(latent_shape)
        self.register_buffer("codebook", codebook.detach().clone())
        self.project = nn.Linear(codebook.shape[1], dim, bias=False)
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        self.axes = axial_tables(latent_shape, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, config.num_heads, length) for _ in range(config.num_layers))
        self.norm, self.head = PlainNorm(dim), nn.Linear(dim, num_codes, bias=False)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            for layer in (block.q, block.k, block.v):
                nn.init.normal_(layer.weight, std=dim**-0.5)
            nn.init.normal_(block.out.weight, std=(dim * config.num_layers) ** -0.5)

    def loss(self, codes: Tensor) -> Tensor:
        """Mean cross-entropy of each clip's codes int64 [B, t, h, w] in nats, [B]."""
        codes = codes.flatten(1)
        before = self.project(F.embedding(codes[:, :-1], self.codebook))
        x = torch.cat((self.start.expand(len(codes), 1, -1), before), 1) + raster(self.axes)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return F.cross_entropy(self.head(self.norm(x)).transpose(1, 2), codes, reduction="none").mean(1)
