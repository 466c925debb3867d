"""The input and output layers of a prior: embedding of codes, and logits of codes.

A latent has one code per codebook. They are drawn one after the other, as if the codebooks were the last axis of the
raster. Each codebook has its own embeddings and output matrix: row m * K + k of a table belongs to code k of
codebook m.

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
    """Embeds the codes, shifted right by one position; the first input is a learned vector.

    Args:
        config: config of the prior.
        latent_shape: (t, h, w) or (t, h, w, M).
        num_codes: K.
        codebook: the tokenizer's embeddings, float [M * K, D]. The videogpt style stores them, because it cannot work
            without; the modern style does not need them.
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
        # Projecting before the look-up takes M * K rows instead of B * L.
        places = torch.arange(codes.shape[1] - 1, device=codes.device)
        before = F.embedding(self.rows(codes[:, :-1], places), self.table())
        start = self.start.to(before.dtype).expand(len(codes), 1, -1)
        x = torch.cat((start, before), 1)
        return x if self.modern else x + raster(self.axes)

    def rows(self, codes: Tensor, position: Tensor) -> Tensor:
        """The rows of `table` for codes at these positions."""
        return codes if self.num_codebooks == 1 else codes + position % self.num_codebooks * self.num_codes

    def table(self) -> Tensor:
        """The input vector for each code, float [M * K, C]."""
        return self.embedding if self.modern else self.project(self.codebook)

    def first_and_offsets(self, num_positions: int) -> Tensor:
        """The input's position-dependent part, float [L, C]; the first row includes the start vector."""
        offsets = self.start.new_zeros(num_positions, len(self.start)) if self.modern else raster(self.axes)
        offsets[0] += self.start
        return offsets


class CodeHead(nn.Module):
    """Logits of codes; initialised to a uniform distribution.

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
        """Logits float [N, K] of hidden [N, C]; rows are positions in raster order, and N is a multiple of M."""
        if self.shape[0] == 1:
            return F.linear(hidden, self.weight)
        weights = self.weight.view(self.shape)
        by_codebook = hidden.unflatten(0, (-1, self.shape[0])).transpose(0, 1)  # [M, N / M, C]
        return (by_codebook @ weights.transpose(1, 2)).transpose(0, 1).flatten(0, 1)
