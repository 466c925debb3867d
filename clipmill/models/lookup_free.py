"""Quantizers with a fixed grid as codebook, which need no learning, initialisation, restarts or synchronisation.

`FiniteScalar` (FSQ): Mentzer et al., arXiv 2309.15505, section 3.1. `LookupFree` (LFQ): Yu et al., arXiv 2310.05737,
section 3.1; on a sphere it is BSQ: Zhao et al., arXiv 2406.07548, section 4.1. Interface and shapes are as in
``quantizers.py``: N rows, M codebooks, K codes, D channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.quantizers import Quantized, codebook_metrics, count_codes, straight_through, table_rows
from clipmill.models.ranks import sum_over_ranks, world_size

__all__ = ["FiniteScalar", "LookupFree"]

BOUND_MARGIN = 1e-3
"""Relative margin of the bound of `FiniteScalar` beyond the outermost levels, so that rounding can reach them."""


class _Grid(nn.Module):
    """A codebook that is a grid. A code is the mixed-radix number of its channels' levels; the first channel is the
    lowest digit.

    Args:
        levels: number of levels of each channel of one codebook.
        num_codebooks: M, all with the same levels.
    """

    levels: Tensor
    bases: Tensor

    def __init__(self, levels: tuple[int, ...], num_codebooks: int) -> None:
        super().__init__()
        self.num_codes = math.prod(levels)
        self.num_codebooks = num_codebooks
        bases = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("bases", torch.tensor(bases), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """Embeddings of all codes, float32 [M * K, D / M]. Each access computes the whole table."""
        table = self._value(torch.arange(self.num_codes, device=self.bases.device)[:, None] // self.bases % self.levels)
        return table.repeat(self.num_codebooks, 1)

    def embed(self, codes: Tensor) -> Tensor:
        """Embeddings float32 [..., D] of codes int64 [..., M]."""
        return self._value(codes[..., None] // self.bases % self.levels).flatten(-2)

    def _split(self, latents: Tensor) -> Tensor:
        """Float32 [N, M, D / M] of latents [N, D]."""
        return latents.float().unflatten(1, (self.num_codebooks, -1))

    def _value(self, digits: Tensor) -> Tensor:
        """Channel values, float32 [..., D / M], of level numbers int64 [..., D / M]."""
        raise NotImplementedError

    def _finish(
        self,
        latents: Tensor,
        values: Tensor,
        digits: Tensor,
        commitment: Tensor,
        entropy: Tensor | None,
        weight: Tensor | None,
    ) -> Quantized:
        """The result for level numbers int64 [N, M, D / M]; ``values`` carry the gradient."""
        with torch.no_grad():
            codes = (digits * self.bases).sum(-1)
            table = latents.new_empty(self.num_codes * self.num_codebooks, dtype=torch.float32)
            counts = count_codes(table_rows(codes, self.num_codes), weight, table)
            metrics = {}
            if self.training:
                counts = sum_over_ranks(counts)
                metrics = codebook_metrics(counts, self.num_codebooks)
        return Quantized(values.flatten(1).to(latents.dtype), codes, commitment, entropy, counts, metrics)


class FiniteScalar(_Grid):
    """FSQ: each channel is bounded by a tanh and rounded to one of a few levels. There is no auxiliary loss."""

    def forward(self, latents: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantises latents [N, D]; see `EMACodebook.forward`. The commitment is zero, because the tanh bounds all
        rows.
        """
        with torch.autocast(latents.device.type, enabled=False):
            half = (self.levels - 1) * (1 + BOUND_MARGIN) / 2
            # An even number of levels has no level at 0, so the tanh is shifted by half a level; 0 still maps to the
            # middle.
            offset = (self.levels % 2 == 0) / 2
            bounded = (self._split(latents) + (offset / half).atanh()).tanh() * half - offset
            rounded = straight_through(bounded, bounded.round())
            digits = (rounded.detach().round() + self.levels // 2).long()
            commitment = rounded.new_zeros(len(rounded))
            return self._finish(latents, rounded / (self.levels // 2), digits, commitment, None, weight)

    def _value(self, digits: Tensor) -> Tensor:
        half = self.levels // 2
        return (digits - half) / half


class LookupFree(_Grid):
    """LFQ: each channel is replaced by its sign. An entropy loss makes each choice confident and the use of codes
    uniform.

    Args:
        num_bits: log2 K, and the channels of one codebook.
        num_codebooks: M.
        temperature: temperature of the probabilities p(c | z) in the entropies; see `_entropy`.
        spherical: first scale each row to the length of the codes (BSQ), which bounds the rows.
    """

    def __init__(self, num_bits: int, num_codebooks: int, temperature: float, spherical: bool = False) -> None:
        super().__init__((2,) * num_bits, num_codebooks)
        self.temperature = temperature
        self.spherical = spherical

    def forward(self, latents: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantises latents [N, D]; see `EMACodebook.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            parts = self._split(latents)
            if self.spherical:
                parts = F.normalize(parts, dim=-1) * parts.shape[-1] ** 0.5
            digits = (parts.detach() > 0).long()
            chosen = self._value(digits)
            commitment = (parts - chosen).square().mean((1, 2))
            entropy = self._entropy(parts, weight) if self.training else None
            return self._finish(latents, straight_through(parts, chosen), digits, commitment, entropy, weight)

    def _value(self, digits: Tensor) -> Tensor:
        return digits.float() * 2 - 1

    def _entropy(self, parts: Tensor, weight: Tensor | None) -> Tensor:
        """E[H(p(c | z))] - H(E[p(c | z)]) in nats per bit, a mean over the codebooks, 0-d.

        p(c | z) = softmax over c of -|z - e_c|^2 / temperature. The signs are independent given z, so p is the product
        of the bits' probabilities sigmoid(4 z / temperature): the first entropy is a sum over bits, and the mean of p
        over all K codes is the product of two matrices [sqrt(K), N] and [N, sqrt(K)], which needs no N x K table.
        """
        weight = parts.new_ones(len(parts)) if weight is None else weight
        num_rows = sum_over_ranks(weight.sum())
        logits = 4 * parts / self.temperature  # [N, M, bits]
        ones = logits.sigmoid()
        # The entropy of a bit is computed from its logit, because the gradient of entr is infinite at 0, to which the
        # probabilities of rows far from 0 round. For the same reason shares are clamped below.
        far = logits.abs()
        single = (F.softplus(-far) + far * (-far).sigmoid()).sum(-1)  # [N, M]
        # Scaled by the number of ranks, because the optimizer uses the mean of the ranks' gradients.
        ranks = world_size()
        certainty = _over_ranks((single * weight[:, None]).sum(0) * ranks / num_rows)
        low, high = (_joint(half) for half in ones.tensor_split([ones.shape[-1] // 2], -1))
        joint = torch.einsum("nmh,nml->mhl", high * weight[:, None, None], low).flatten(1)  # [M, K]
        shares = _over_ranks(joint * ranks / num_rows).clamp(min=torch.finfo(joint.dtype).tiny)
        variety = torch.special.entr(shares).sum(1)
        return (certainty - variety).mean() / ones.shape[-1]


def _joint(ones: Tensor) -> Tensor:
    """Probabilities [N, M, 2 ** bits] of all values of independent bits that are 1 with probabilities [N, M, bits]."""
    joint = ones.new_ones(*ones.shape[:2], 1)
    for bit in ones.unbind(-1):
        joint = torch.cat((joint * (1 - bit)[..., None], joint * bit[..., None]), -1)
    return joint


def _over_ranks(value: Tensor) -> Tensor:
    """Mean over ranks with this rank's own gradient. Averaging gradients over ranks then gives the gradient of the
    mean.
    """
    everybodys = sum_over_ranks(value.detach().clone()) / world_size()
    return value + (everybodys - value).detach()
