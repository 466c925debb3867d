"""Vector quantisation with a codebook that follows the data by exponential moving averages.

van den Oord et al., arXiv 1711.00937, appendix A.1; as in VideoGPT a code that almost nothing maps to
restarts from an encoder output. Everything the codebook learns from is summed over all ranks, so every
rank holds the same codebook, and no decision waits for the device: no host sync, no N x K one-hot.

Shapes: N rows (latents of the local batch), K codes, D channels of a code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.ranks import rank, sum_over_ranks, world_size

__all__ = ["EMACodebook", "Quantized", "nearest_codes"]

CHUNK_SCORES = 2**22
"""Distances held at once (float32: 16 MiB)."""
_SALT = 0x636C6970
"""Keeps the draws of restart rows apart from every other keyed draw."""
_START_THRESHOLDS = 2.0
"""A fresh code starts with so many restart thresholds as its count: data soon outweighs its first row,
and one that finds no data restarts again after ln(2) / -ln(decay) = 69 steps."""


class Quantized(NamedTuple):
    """What the codebook makes of latents [N, D]."""

    latents: Tensor
    """float [N, D]: the chosen embeddings; the gradient goes straight through to the input."""
    codes: Tensor
    """int64 [N]."""
    commitment: Tensor
    """float32 [N]: mean square distance of a row to its embedding (gradient to the row alone)."""
    metrics: dict[str, Tensor]
    """0-d: ``codebook_usage`` (share of codes in the batch), ``codebook_perplexity``, ``codebook_restarts``."""


def nearest_codes(rows: Tensor, embeddings: Tensor) -> Tensor:
    """Index of the nearest embedding to each row, int64 [N], from float32 [N, D] and [K, D]; memory O(N + K)."""
    # |z|^2 is the same for all codes of a row, so |e|^2 - 2 z.e orders them alike.
    norms = embeddings.square().sum(1)
    chunks = rows.split(max(1, CHUNK_SCORES // len(embeddings)))
    return torch.cat([torch.addmm(norms, chunk, embeddings.t(), alpha=-2).argmin(1) for chunk in chunks])


class EMACodebook(nn.Module):
    """The codebook and its moving averages; all of it is state that a checkpoint carries.

    Args:
        num_codes: K.
        dim: D.
        decay: of counts and sums, per update.
        restart_share: a code whose averaged count falls below this share of rows per step / K restarts.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialised: Tensor
    num_updates: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float, restart_share: float) -> None:
        super().__init__()
        self.decay = decay
        self.restart_share = restart_share
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, latents: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantises latents [N, D]; in training mode the codebook then learns from them.

        Args:
            latents: float [N, D]; the same N on every rank.
            weight: float32 [N], 0 for rows of padding, which the codebook does not learn from.
        """
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents.float()
            with torch.no_grad():
                learned = rows.detach()
                if self.training:
                    candidates = self._draw_rows(learned)
                    self._initialise(candidates)
                codes = nearest_codes(learned, self.codebook)
                chosen = F.embedding(codes, self.codebook)
                weight = torch.ones_like(rows[:, 0]) if weight is None else weight
                counts = torch.zeros_like(self.counts).index_add_(0, codes, weight)
                restarts = torch.zeros_like(self.counts)
                if self.training:
                    sums = _sum_by_code(learned * weight[:, None], codes, len(self.counts))
                    counts, sums = sum_over_ranks(torch.cat((counts[:, None], sums), 1)).tensor_split([1], 1)
                    counts = counts[:, 0]
                    restarts = self._update(counts, sums, candidates)
                metrics = _codebook_metrics(counts) | {"codebook_restarts": restarts.sum()}
            commitment = (rows - chosen).square().mean(1)
            straight_through = rows + (chosen - learned)
        return Quantized(straight_through.to(latents.dtype), codes, commitment, metrics)

    def _initialise(self, candidates: Tensor) -> None:
        """Takes the first batch's rows as codes; a no-op on the device ever after."""
        self.codebook.copy_(torch.where(self.initialised, self.codebook, candidates))

    def _update(self, counts: Tensor, sums: Tensor, candidates: Tensor) -> Tensor:
        """Moves averages and embeddings; returns which codes restarted, bool [K].

        Args:
            counts: rows of all ranks that map to each code in this batch, float32 [K].
            sums: the sum of those rows, float32 [K, D].
            candidates: a row for each code that restarts, float32 [K, D].
        """
        rows_per_code = counts.sum() / len(counts)
        threshold = rows_per_code * self.restart_share
        fresh_count = threshold * _START_THRESHOLDS if self.restart_share else rows_per_code
        fresh_sums = self.codebook * fresh_count
        self.counts.copy_(torch.where(self.initialised, self.counts, fresh_count).lerp_(counts, 1 - self.decay))
        self.sums.copy_(torch.where(self.initialised, self.sums, fresh_sums).lerp_(sums, 1 - self.decay))
        restarts = self.counts < threshold
        self.counts.copy_(torch.where(restarts, fresh_count, self.counts))
        self.sums.copy_(torch.where(restarts[:, None], candidates * fresh_count, self.sums))
        # A code that is never used and never restarts (restart_share 0) keeps its place when its count underflows.
        used = self.counts[:, None] > torch.finfo(torch.float32).tiny
        self.codebook.copy_(torch.where(used, self.sums / self.counts[:, None], self.codebook))
        self.initialised.fill_(True)
        self.num_updates.add_(1)
        return restarts

    def _draw_rows(self, rows: Tensor) -> Tensor:
        """One row of the global batch for each code, float32 [K, D], the same for any split over ranks.

        The global batch is cut into K even parts and a keyed hash picks a row in each, so the rows are
        distinct where K <= N. Each rank fills in the rows it owns; the sum over ranks completes them.
        """
        num_codes, num_local = len(self.counts), len(rows)
        num_rows = num_local * world_size()
        code = torch.arange(num_codes, device=rows.device)
        uniform = _keyed_uniform(self.num_updates, code)
        wanted = ((code + uniform) * (num_rows / num_codes)).long().clamp_(max=num_rows - 1)
        local = wanted - rank() * num_local
        owned = (local >= 0) & (local < num_local)
        found = F.embedding(local.clamp(0, num_local - 1), rows)
        return sum_over_ranks(torch.where(owned[:, None], found, 0.0))


def _sum_by_code(rows: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """Sum of the rows of each code, float32 [K, D]."""
    # The gradient of a look-up is this sum. index_add_ adds in any order on CUDA, and on a CPU it was measured
    # between 1 and 40 ms for the same work, this between 0.2 and 3.
    return torch.ops.aten.embedding_dense_backward(rows, codes, num_codes, -1, False)


def _codebook_metrics(counts: Tensor) -> dict[str, Tensor]:
    """Usage and perplexity of a batch from its counts [K]."""
    share = counts / counts.sum().clamp(min=1)
    entropy = torch.special.entr(share).sum()
    return {"codebook_usage": (counts > 0).float().mean(), "codebook_perplexity": entropy.exp()}


def _keyed_uniform(step: Tensor, index: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) for each index, a pure function of (step, index): splitmix64 (Steele et al., 2014)."""
    x = (step * 0x9E3779B1 + _SALT) * 0x5851F42D4C957F2D + index * -0x61C8864680B583EB
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return _shift_right(x ^ _shift_right(x, 31), 11).double() * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's own fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
