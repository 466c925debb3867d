"""The ends of a prior: codes become its input, its output becomes logits of codes.

A latent has one code of each codebook. They are drawn one after the other, as if the codebooks were a last axis of the
raster; each has embeddings and a matrix of logits of its own, row m * K + k of a table those of code k of codebook m.

B: batch   M: codebooks   K: codes of one   L: positions, of which p is a code of codebook p mod M   C: hidden channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import PriorModelConfig
from clipmill.models.positions import axial_tables, raster

__all__ = ["CodeHead", "CodeInput"]


class CodeInput(nn.Module):
    """Embeds the codes before each position, shifted right by a learned start.

    Args:
        config: of the prior.
        latent_shape: (t, h, w) or (t, h, w, M).
        num_codes: K.
        codebook: float [M * K, D]; state of the videogpt style, since without it such a prior cannot be used.
    """

    codebook: Tensor

    def __init__(
        self, config: PriorModelConfig, latent_shape: tuple[int, ...], num_codes: int, codebook: Tensor | None
    ) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.num_codes = num_codes
        self.num_codebooks = 1 if len(latent_shape) == 3 else latent_shape[3]
        num_rows = num_codes * self.num_codebooks
        self.modern = config.style == "modern"
        if self.modern:
            self.embedding = nn.Parameter(torch.randn(num_rows, dim) * 0.02)
            self.start = nn.Parameter(torch.randn(dim) * 0.02)
            return
        if codebook is None or len(codebook) != num_rows:
            raise ValueError(f"a codebook of {0 if codebook is None else len(codebook)} rows for {num_rows} codes")
        self.register_buffer("codebook", codebook.detach().clone())
        self.project = nn.Linear(codebook.shape[1], dim, bias=False)
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        self.axes = axial_tables(latent_shape, dim)
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Embeds codes int64 [B, L] as float [B, L, C]; position p holds the code at p - 1."""
        # M * K projected codebook rows, not B * L: the look-up comes after the product.
        places = torch.arange(codes.shape[1] - 1, device=codes.device)
        before = F.embedding(self.rows(codes[:, :-1], places), self.table())
        start = self.start.to(before.dtype).expand(len(codes), 1, -1)
        x = torch.cat((start, before), 1)
        return x if self.modern else x + raster(self.axes)

    def rows(self, codes: Tensor, position: Tensor) -> Tensor:
        """Rows of `table` that codes at these positions mean."""
        return codes if self.num_codebooks == 1 else codes + position % self.num_codebooks * self.num_codes

    def table(self) -> Tensor:
        """What each code adds to the next position, float [M * K, C]."""
        return self.embedding if self.modern else self.project(self.codebook)

    def first_and_offsets(self, num_positions: int) -> Tensor:
        """What each position adds by itself, float [L, C]; the first includes the start."""
        offsets = self.start.new_zeros(num_positions, len(self.start)) if self.modern else raster(self.axes)
        offsets[0] += self.start
        return offsets


class CodeHead(nn.Module):
    """Logits of codes; at the start those of a uniform guess.

    Args:
        dim: C.
        num_codes: K.
        num_codebooks: M.
    """

    def __init__(self, dim: int, num_codes: int, num_codebooks: int) -> None:
        super().__init__()
        self.shape = (num_codebooks, num_codes, dim)
        self.weight = nn.Parameter(torch.zeros(num_codebooks * num_codes, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits float [N, K] of hidden [N, C], of positions in raster order, N a multiple of M."""
        if self.shape[0] == 1:
            return F.linear(hidden, self.weight)
        weights = self.weight.view(self.shape)
        by_codebook = hidden.unflatten(0, (-1, self.shape[0])).transpose(0, 1)  # [M, N / M, C]
        return (by_codebook @ weights.transpose(1, 2)).transpose(0, 1).flatten(0, 1)
