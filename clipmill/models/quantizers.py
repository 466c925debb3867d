"""Vector quantisation: shared functions, and the two learned codebooks.

`EMACodebook` learns by moving averages (van den Oord et al., arXiv 1711.00937, appendix A.1). As in VideoGPT, a code
that is almost never used restarts from an encoder output. All statistics are summed over all ranks, so every rank holds
the same codebook. There is no host sync and no N x K one-hot. `LinearCodebook` learns a linear map of fixed codes by
gradient (SimVQ: Zhu et al., arXiv 2411.02038). Quantizers without a learned codebook are in ``lookup_free.py``.

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
"""How the gradient passes the quantisation: by `straight_through` or by `rotated`."""

CHUNK_SCORES = 2**22
"""Distances held at once (float32: 16 MiB)."""
KMEANS_ROUNDS = 10
_SALT = 0x636C6970
"""Separates the random draws of restart rows from all other keyed draws."""
_START_THRESHOLDS = 2.0
"""Initial count of a restarted code, in units of the restart threshold. It is small, so that data soon outweighs the
initial row; an unused code restarts again after ln(2) / -ln(decay) = 69 steps.
"""


class Quantized(NamedTuple):
    """The result of quantising latents [N, D]."""

    latents: Tensor
    """float [N, D]: the chosen embeddings; their gradient is passed on to the input."""
    codes: Tensor
    """int64 [N, M]."""
    commitment: Tensor
    """float32 [N]: mean square distance of a row to its embedding (gradient to the row alone)."""
    entropy: Tensor | None
    """float32 0-d, over the rows of all ranks: the entropy loss of `LookupFree`; None for other quantizers."""
    counts: Tensor
    """float32 [M * K]: rows per code, over all ranks in training mode, otherwise over this rank."""
    metrics: dict[str, Tensor]
    """0-d, in training mode only: those of `codebook_metrics`, and ``codebook_restarts`` if codes restart."""
    codebook_loss: Tensor | None = None
    """float32 [N]: the distance of ``commitment``, with gradient to the codebook only; None for codebooks without
    gradient.
    """


def straight_through(rows: Tensor, chosen: Tensor) -> Tensor:
    """The embeddings ``chosen``; their gradient is passed to ``rows`` unchanged (arXiv 1711.00937). Same shapes."""
    return rows + (chosen - rows).detach()


def rotated(rows: Tensor, chosen: Tensor) -> Tensor:
    """The embeddings ``chosen``, expressed as rotated and scaled ``rows``; rotation and scale are constants for the
    gradient.

    The rotation trick: Fifty et al., arXiv 2410.06424, equation 4. The rotation from a row's direction u to its
    embedding's direction q is x - 2 (x . s) s + 2 (x . u) q, where s is the direction of u + q.

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
    """Lengths [..., 1] of rows [..., D], clamped to at least 1e-12."""
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12)


def nearest_codes(rows: Tensor, embeddings: Tensor) -> Tensor:
    """Index of the nearest embedding to each row, int64 [N], from float32 [N, D] and [K, D]; memory O(N + K)."""
    # |z|^2 is the same for all codes of a row, so comparing |e|^2 - 2 z.e is enough.
    norms = embeddings.square().sum(1)
    chunks = rows.split(max(1, CHUNK_SCORES // len(embeddings)))
    return torch.cat([torch.addmm(norms, chunk, embeddings.t(), alpha=-2).argmin(1) for chunk in chunks])


def table_rows(codes: Tensor, num_codes: int) -> Tensor:
    """The rows of a table [M * K, ...] for codes int64 [..., M]."""
    return codes + torch.arange(codes.shape[-1], device=codes.device) * num_codes


def count_codes(rows: Tensor, weight: Tensor | None, table: Tensor) -> Tensor:
    """Weighted count of each row of a table [M * K, ...] in rows int64 [N, M], float32 [M * K].

    Args:
        rows: see `table_rows`.
        weight: float32 [N], 0 for padding.
        table: gives length and device.
    """
    weight = table.new_ones(len(rows)) if weight is None else weight
    return table.new_zeros(len(table)).index_add_(0, rows.flatten(), weight.repeat_interleave(rows.shape[1]))


def codebook_metrics(counts: Tensor, num_codebooks: int = 1) -> dict[str, Tensor]:
    """``codebook_usage`` (share of codes that occur) and ``codebook_perplexity`` from counts float [M * K].

    Perplexity is the exponential of the entropy of the code frequencies, averaged over codebooks.
    """
    counts = counts.view(num_codebooks, -1)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.special.entr(share).sum(1).exp()
    return {"codebook_usage": (counts > 0).float().mean(), "codebook_perplexity": perplexity.mean()}


class EMACodebook(nn.Module):
    """A codebook that is learned by moving averages. All of its state is stored in checkpoints.

    Args:
        num_codes: K.
        dim: D.
        decay: decay of counts and sums per update.
        restart_share: a code restarts if its averaged count falls below this share of (rows per step) / K.
        num_codebooks: M; each quantises D / M channels.
        cosine: compare directions: rows and embeddings are scaled to length sqrt(D / M), like rows of unit variance.
        start: initial codes: ``rows`` of the first batch, or the centres of its clusters (``kmeans``).
        gradient: how the gradient passes the quantisation.
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
        """The embeddings of all codes [M * K, D / M]; with cosine distance, averages are scaled back to full length."""
        return self._normalised(self.codebook)

    def _normalised(self, rows: Tensor) -> Tensor:
        """Rows [..., D / M], scaled to the fixed length if the distance is cosine."""
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
        """In the first step, takes rows or cluster centres of the batch as codes; afterwards a no-op on the device.

        Args:
            candidates: a row for each code, float32 [M * K, D / M].
            parts: this rank's rows, float32 [N, M, D / M].
        """
        if self._may_cluster:
            # Reads from the device in the first two steps only. The second read confirms the first step: a skipped step
            # would have restored the buffers.
            self._may_cluster = not self.initialised
            if self._may_cluster:
                self._cluster(candidates, parts)
                return
        self.codebook.copy_(torch.where(self.initialised, self.codebook, candidates))

    def _cluster(self, centres: Tensor, parts: Tensor) -> None:
        """k-means over the rows of all ranks, from the given centres."""
        self.codebook.copy_(centres)
        for _ in range(KMEANS_ROUNDS):
            rows = table_rows(self._nearest(parts), self.num_codes)
            counts, sums = self._gather(count_codes(rows, None, self.codebook), parts, rows)
            centres = self._normalised(sums / counts.clamp(min=1)[:, None])
            self.codebook.copy_(torch.where(counts[:, None] > 0, centres, self.codebook))

    def _update(self, counts: Tensor, sums: Tensor, candidates: Tensor) -> Tensor:
        """Updates averages and embeddings. Returns which codes restarted, bool [M * K].

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
        """One row of the global batch for each code, float32 [M * K, D / M], independent of the split over ranks.

        The global batch is cut into K equal ranges, and a keyed hash picks a row of each, so that the rows of a
        codebook are distinct if K <= N. Each rank contributes the rows that it holds; the sum over ranks completes
        them.

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
    """SimVQ: fixed random codes with a learned linear map. The map moves all codes together, so no code dies.

    Args:
        num_codes: K.
        dim: D.
        num_codebooks: M; each quantises D / M channels.
        gradient: how the gradient passes the quantisation.
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
    """The embeddings ``chosen`` for parts [N, M, D / M], with the configured gradient."""
    return rotated(parts, chosen) if gradient == "rotation" else straight_through(parts, chosen)


def _nearest_of_each(parts: Tensor, table: Tensor) -> Tensor:
    """Codes int64 [N, M] of parts [N, M, D / M] by embeddings [M * K, D / M]."""
    tables = table.chunk(parts.shape[1])
    return torch.stack([nearest_codes(part, own) for part, own in zip(parts.unbind(1), tables, strict=True)], 1)


def _sum_by_code(rows: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """Sum of the rows of each code, float32 [num_codes, channels]."""
    # This sum is the gradient of an embedding look-up. index_add_ is nondeterministic on CUDA, and on a CPU it took 1
    # to 40 ms for the same work, against 0.2 to 3 ms for this.
    return torch.ops.aten.embedding_dense_backward(rows, codes, num_codes, -1, False)


def _keyed_uniform(step: Tensor, index: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) for each index, a pure function of (step, index): splitmix64 (Steele et al., 2014)."""
    x = (step * 0x9E3779B1 + _SALT) * 0x5851F42D4C957F2D + index * -0x61C8864680B583EB
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return _shift_right(x ^ _shift_right(x, 31), 11).double() * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own shift is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
