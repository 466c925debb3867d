"""Vector quantisation: what all quantizers share, and the two learned codebooks.

`EMACodebook` follows the data by moving averages: van den Oord et al., arXiv 1711.00937, appendix A.1; as in VideoGPT a
code that almost nothing maps to restarts from an encoder output. Everything it learns from is summed over all ranks, so
every rank holds the same codebook, and no decision waits for the device: no host sync, no N x K one-hot.
`LinearCodebook` learns a linear map of fixed codes by gradient (SimVQ: Zhu et al., arXiv 2411.02038). Quantizers
without a learned codebook are in ``lookup_free.py``.

A quantizer is a module with ``codebook``, float32 [M * K, D / M]; ``forward(latents, weight) -> Quantized``; and
``embed(codes) -> latents``. With several codebooks each quantises its own slice of the channels.

Shapes: N rows (latents of the local batch), M codebooks, K codes of each, D channels of a row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.ranks import rank, sum_over_ranks, world_size

__all__ = [
    "CodeGradient",
    "EMACodebook",
    "LinearCodebook",
    "Quantized",
    "codebook_metrics",
    "count_codes",
    "nearest_codes",
    "rotated",
    "straight_through",
    "table_rows",
]

CodeGradient = Literal["straight_through", "rotation"]
"""How the gradient passes a code: see the functions of these names."""

CHUNK_SCORES = 2**22
"""Distances held at once (float32: 16 MiB)."""
KMEANS_ROUNDS = 10
_SALT = 0x636C6970
"""Keeps the draws of restart rows apart from every other keyed draw."""
_START_THRESHOLDS = 2.0
"""Count of a fresh code in restart thresholds: data soon outweighs its first row, and a code that finds no data
restarts after ln(2) / -ln(decay) = 69 steps."""


class Quantized(NamedTuple):
    """What a quantizer makes of latents [N, D]."""

    latents: Tensor
    """float [N, D]: the chosen embeddings; the gradient passes them to the input."""
    codes: Tensor
    """int64 [N, M]."""
    commitment: Tensor
    """float32 [N]: mean square distance of a row to its embedding (gradient to the row alone)."""
    entropy: Tensor | None
    """float32 0-d, over all ranks' rows: what `LookupFree` minimises beside; None for the others."""
    counts: Tensor
    """float32 [M * K]: rows of each code, of all ranks in training mode, else of this rank alone."""
    metrics: dict[str, Tensor]
    """0-d, of training mode alone: see `codebook_metrics`, and ``codebook_restarts`` where codes restart."""
    codebook_loss: Tensor | None = None
    """float32 [N]: the same distance as ``commitment`` with its gradient to the codebook alone; None for codebooks that
    no gradient reaches."""


def straight_through(rows: Tensor, chosen: Tensor) -> Tensor:
    """The embeddings ``chosen`` with the gradient of ``rows`` as if both were one (arXiv 1711.00937); same shapes."""
    return rows + (chosen - rows).detach()


def rotated(rows: Tensor, chosen: Tensor) -> Tensor:
    """The embeddings ``chosen`` as rows turned and scaled onto them, which are constants for the gradient.

    The rotation trick: Fifty et al., arXiv 2410.06424, equation 4. The rotation in the plane of a row's direction u and
    its embedding's q is x - 2 (x . s) s + 2 (x . u) q, with s the direction of u + q.

    Args:
        rows: float32 [..., D].
        chosen: float32 [..., D].
    """
    length = torch.linalg.vector_norm(chosen, dim=-1, keepdim=True) / _length(rows.detach())
    u, q = (x.detach() / _length(x.detach()) for x in (rows, chosen))
    s = (u + q) / _length(u + q)
    turned = rows - 2 * (rows * s).sum(-1, keepdim=True) * s + 2 * (rows * u).sum(-1, keepdim=True) * q
    return turned * length.detach()


def _length(rows: Tensor) -> Tensor:
    """Lengths [..., 1] of rows [..., D], at least a tiny number."""
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12)


def nearest_codes(rows: Tensor, embeddings: Tensor) -> Tensor:
    """Index of the nearest embedding to each row, int64 [N], from float32 [N, D] and [K, D]; memory O(N + K)."""
    # |z|^2 is the same for all codes of a row, so |e|^2 - 2 z.e orders them alike.
    norms = embeddings.square().sum(1)
    chunks = rows.split(max(1, CHUNK_SCORES // len(embeddings)))
    return torch.cat([torch.addmm(norms, chunk, embeddings.t(), alpha=-2).argmin(1) for chunk in chunks])


def table_rows(codes: Tensor, num_codes: int) -> Tensor:
    """Rows of a table [M * K, ...] that codes int64 [..., M] mean."""
    return codes + torch.arange(codes.shape[-1], device=codes.device) * num_codes


def count_codes(rows: Tensor, weight: Tensor | None, table: Tensor) -> Tensor:
    """How often each row of a table [M * K, ...] is meant by rows int64 [N, M], float32 [M * K].

    Args:
        rows: see `table_rows`.
        weight: float32 [N], 0 for padding.
        table: gives length and device.
    """
    weight = table.new_ones(len(rows)) if weight is None else weight
    return table.new_zeros(len(table)).index_add_(0, rows.flatten(), weight.repeat_interleave(rows.shape[1]))


def codebook_metrics(counts: Tensor, num_codebooks: int = 1) -> dict[str, Tensor]:
    """``codebook_usage`` (share of codes that occur) and ``codebook_perplexity`` from counts float [M * K].

    Perplexity is the exponential of the entropy of the codes' frequencies; of several codebooks the mean.
    """
    counts = counts.view(num_codebooks, -1)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.special.entr(share).sum(1).exp()
    return {"codebook_usage": (counts > 0).float().mean(), "codebook_perplexity": perplexity.mean()}


class EMACodebook(nn.Module):
    """The codebook and its moving averages; all of it is state that a checkpoint carries.

    Args:
        num_codes: K.
        dim: D.
        decay: of counts and sums, per update.
        restart_share: a code whose averaged count falls below this share of rows per step / K restarts.
        num_codebooks: M; each quantises D / M channels.
        cosine: compare directions: rows and embeddings have length sqrt(D / M), like rows of unit variance.
        start: the first codes are ``rows`` of the first batch, or the centres of its clusters (``kmeans``).
        gradient: how it passes the codes.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialised: Tensor
    num_updates: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float,
        restart_share: float,
        num_codebooks: int = 1,
        cosine: bool = False,
        start: Literal["rows", "kmeans"] = "rows",
        gradient: CodeGradient = "straight_through",
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.num_codebooks = num_codebooks
        self.decay = decay
        self.restart_share = restart_share
        self.cosine = cosine
        self.gradient = gradient
        self._may_cluster = start == "kmeans"
        table = (num_codes * num_codebooks, dim // num_codebooks)
        self.register_buffer("codebook", self._normalised(torch.randn(table)))
        self.register_buffer("counts", torch.zeros(table[0]))
        self.register_buffer("sums", torch.zeros(table))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, latents: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantises latents [N, D]; in training mode the codebook then learns from them.

        Args:
            latents: float [N, D]; the same N on every rank.
            weight: float32 [N], 0 for rows of padding, which the codebook does not learn from.
        """
        with torch.autocast(latents.device.type, enabled=False):
            parts = self._normalised(latents.float().unflatten(1, (self.num_codebooks, -1)))  # [N, M, D / M]
            with torch.no_grad():
                learned = parts.detach()
                if self.training:
                    candidates = self._draw_rows(learned)
                    self._initialise(candidates, learned)
                codes = self._nearest(learned)
                rows = table_rows(codes, self.num_codes)
                chosen = F.embedding(rows, self._table())
                counts = count_codes(rows, weight, self.codebook)
                metrics = {}
                if self.training:
                    weighted = learned if weight is None else learned * weight[:, None, None]
                    counts, sums = self._gather(counts, weighted, rows)
                    restarts = self._update(counts, sums, candidates)
                    metrics = codebook_metrics(counts, self.num_codebooks) | {"codebook_restarts": restarts.sum()}
            commitment = (parts - chosen).square().mean((1, 2))
            passed = _passed(parts, chosen, self.gradient).flatten(1)
        return Quantized(passed.to(latents.dtype), codes, commitment, None, counts, metrics)

    def embed(self, codes: Tensor) -> Tensor:
        """Embeddings float32 [..., D] of codes int64 [..., M]."""
        return F.embedding(table_rows(codes, self.num_codes), self._table()).flatten(-2)

    def _table(self) -> Tensor:
        """The embeddings of all codes [M * K, D / M]; averages of several steps get their length back."""
        return self._normalised(self.codebook)

    def _normalised(self, rows: Tensor) -> Tensor:
        """Rows [..., D / M] at the length that cosine distance wants; unchanged without it."""
        return F.normalize(rows, dim=-1) * rows.shape[-1] ** 0.5 if self.cosine else rows

    def _nearest(self, parts: Tensor) -> Tensor:
        """Codes int64 [N, M] of parts [N, M, D / M]."""
        return _nearest_of_each(parts, self._table())

    def _gather(self, counts: Tensor, weighted: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Counts [M * K] and sums [M * K, D / M] of all ranks, in one collective."""
        sums = _sum_by_code(weighted.flatten(0, 1), rows.flatten(), len(self.codebook))
        counts, sums = sum_over_ranks(torch.cat((counts[:, None], sums), 1)).tensor_split([1], 1)
        return counts[:, 0], sums

    def _initialise(self, candidates: Tensor, parts: Tensor) -> None:
        """Takes the first batch's rows, or the centres of its clusters, as codes; a no-op on the device ever after.

        Args:
            candidates: a row for each code, float32 [M * K, D / M].
            parts: this rank's rows, float32 [N, M, D / M].
        """
        if self._may_cluster:
            # Reads the device in the first two steps alone. The second sees that the first was not undone: a skipped
            # step puts the buffers back.
            self._may_cluster = not self.initialised
            if self._may_cluster:
                self._cluster(candidates, parts)
                return
        self.codebook.copy_(torch.where(self.initialised, self.codebook, candidates))

    def _cluster(self, centres: Tensor, parts: Tensor) -> None:
        """k-means of all ranks' rows from the given centres."""
        self.codebook.copy_(centres)
        for _ in range(KMEANS_ROUNDS):
            rows = table_rows(self._nearest(parts), self.num_codes)
            counts, sums = self._gather(count_codes(rows, None, self.codebook), parts, rows)
            centres = self._normalised(sums / counts.clamp(min=1)[:, None])
            self.codebook.copy_(torch.where(counts[:, None] > 0, centres, self.codebook))

    def _update(self, counts: Tensor, sums: Tensor, candidates: Tensor) -> Tensor:
        """Moves averages and embeddings; returns which codes restarted, bool [M * K].

        Args:
            counts: rows of all ranks that map to each code in this batch, float32 [M * K].
            sums: the sum of those rows, float32 [M * K, D / M].
            candidates: a row for each code that restarts, float32 [M * K, D / M].
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
        self.codebook.copy_(torch.where(used, self._normalised(self.sums / self.counts[:, None]), self.codebook))
        self.initialised.fill_(True)
        self.num_updates.add_(1)
        return restarts

    def _draw_rows(self, parts: Tensor) -> Tensor:
        """One row of the global batch for each code, float32 [M * K, D / M], the same for any split over ranks.

        The global batch is cut into K even parts and a keyed hash picks a row in each, so the rows of a codebook are
        distinct where K <= N. Each rank fills in the rows it owns; the sum over ranks completes them.

        Args:
            parts: this rank's rows, float32 [N, M, D / M].
        """
        num_local = len(parts)
        num_rows = num_local * world_size()
        index = torch.arange(len(self.codebook), device=parts.device)
        uniform = _keyed_uniform(self.num_updates, index)
        wanted = ((index % self.num_codes + uniform) * (num_rows / self.num_codes)).long().clamp_(max=num_rows - 1)
        local = wanted - rank() * num_local
        owned = (local >= 0) & (local < num_local)
        place = local.clamp(0, num_local - 1) * self.num_codebooks + index // self.num_codes
        found = F.embedding(place, parts.flatten(0, 1))
        return sum_over_ranks(torch.where(owned[:, None], found, 0.0))


class LinearCodebook(nn.Module):
    """SimVQ: fixed random codes behind a learned linear map, which moves all of them at once, so that none dies.

    Args:
        num_codes: K.
        dim: D.
        num_codebooks: M; each quantises D / M channels.
        gradient: how it passes the codes.
    """

    frozen: Tensor

    def __init__(self, num_codes: int, dim: int, num_codebooks: int, gradient: CodeGradient) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.num_codebooks = num_codebooks
        self.gradient = gradient
        width = dim // num_codebooks
        self.register_buffer("frozen", torch.randn(num_codes * num_codebooks, width) * width**-0.5)
        self.transform = nn.Parameter(torch.eye(width).repeat(num_codebooks, 1, 1))  # [M, D / M, D / M]

    @property
    def codebook(self) -> Tensor:
        """Embeddings of all codes, float32 [M * K, D / M]."""
        return (self.frozen.unflatten(0, (self.num_codebooks, -1)) @ self.transform).flatten(0, 1)

    def forward(self, latents: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantises latents [N, D]; see `EMACodebook.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            parts = latents.float().unflatten(1, (self.num_codebooks, -1))  # [N, M, D / M]
            table = self.codebook
            with torch.no_grad():
                codes = _nearest_of_each(parts, table)
                rows = table_rows(codes, self.num_codes)
                counts = count_codes(rows, weight, table)
                metrics = {}
                if self.training:
                    counts = sum_over_ranks(counts)
                    metrics = codebook_metrics(counts, self.num_codebooks)
            chosen = F.embedding(rows, table)
            commitment = (parts - chosen.detach()).square().mean((1, 2))
            codebook_loss = (parts.detach() - chosen).square().mean((1, 2))
            passed = _passed(parts, chosen.detach(), self.gradient).flatten(1)
        return Quantized(passed.to(latents.dtype), codes, commitment, None, counts, metrics, codebook_loss)

    def embed(self, codes: Tensor) -> Tensor:
        """Embeddings float32 [..., D] of codes int64 [..., M]."""
        return F.embedding(table_rows(codes, self.num_codes), self.codebook).flatten(-2)


def _passed(parts: Tensor, chosen: Tensor, gradient: CodeGradient) -> Tensor:
    """The embeddings ``chosen`` of parts [N, M, D / M], with the configured gradient."""
    return rotated(parts, chosen) if gradient == "rotation" else straight_through(parts, chosen)


def _nearest_of_each(parts: Tensor, table: Tensor) -> Tensor:
    """Codes int64 [N, M] of parts [N, M, D / M] by embeddings [M * K, D / M]."""
    tables = table.chunk(parts.shape[1])
    return torch.stack([nearest_codes(part, own) for part, own in zip(parts.unbind(1), tables, strict=True)], 1)


def _sum_by_code(rows: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """Sum of the rows of each code, float32 [num_codes, channels]."""
    # The gradient of a look-up is this sum. index_add_ adds in any order on CUDA, and on a CPU it was measured
    # between 1 and 40 ms for the same work, this between 0.2 and 3.
    return torch.ops.aten.embedding_dense_backward(rows, codes, num_codes, -1, False)


def _keyed_uniform(step: Tensor, index: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) for each index, a pure function of (step, index): splitmix64 (Steele et al., 2014)."""
    x = (step * 0x9E3779B1 + _SALT) * 0x5851F42D4C957F2D + index * -0x61C8864680B583EB
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return _shift_right(x ^ _shift_right(x, 31), 11).double() * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's own fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
