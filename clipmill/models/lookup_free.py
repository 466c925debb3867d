"""Quantizers whose codebook is a fixed grid: nothing to learn, initialise, restart or keep the same on all ranks.

`FiniteScalar` (FSQ): Mentzer et al., arXiv 2309.15505, section 3.1. `LookupFree` (LFQ): Yu et al., arXiv 2310.05737,
section 3.1; on a sphere it is BSQ: Zhao et al., arXiv 2406.07548, section 4.1. Interface and shapes are those of
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
"""The outermost levels of `FiniteScalar` lie this share inside the bound, so that rounding can reach them."""


class _Grid(nn.Module):
    """A code is a place on a grid: the mixed-radix number of its channels' levels, the first channel counting ones.

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
        """Channel values, float32, of level numbers int64 [..., D / M]."""
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
        """Codes, counts and metrics of level numbers int64 [N, M, D / M] whose values carry the gradient."""
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
    """FSQ: every channel is bounded by a tanh and rounded to one of a few levels; there is no auxiliary loss."""

    def forward(self, latents: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantises latents [N, D]; see `EMACodebook.forward`. The commitment is zero: no row can run away."""
        with torch.autocast(latents.device.type, enabled=False):
            half = (self.levels - 1) * (1 + BOUND_MARGIN) / 2
            # An even number of levels has none at 0: the tanh is shifted by half a level, 0 still maps to the middle.
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
    """LFQ: every channel becomes its sign; an entropy loss makes single choices certain and all codes used.

    Args:
        num_bits: log2 K, and the channels of one codebook.
        num_codebooks: M.
        temperature: of the probabilities p(c | z) in the entropies; see `_entropy`.
        spherical: scale each row of a codebook to the length of its codes first (BSQ), so that no row can run away.
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
        # The entropy of a bit by its logit, and no share below the smallest float: entr has no finite gradient at 0,
        # which shares of rows far from 0 round to.
        far = logits.abs()
        single = (F.softplus(-far) + far * (-far).sigmoid()).sum(-1)  # [N, M]
        # Of the ranks' mean gradient, which the optimizer steps by, this is the whole batch's.
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
    """Mean over ranks whose gradient is this rank's own: with gradients averaged over ranks that is the mean's."""
    everybodys = sum_over_ranks(value.detach().clone()) / world_size()
    return value + (everybodys - value).detach()
