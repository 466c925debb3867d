"""Filters between logits and the draw: temperature, top-k, top-p, min-p, in this order.

K: codes of a position
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Filters", "draw"]

_UNITS = 2**40
"""Probabilities are summed as integer multiples of 2^-40: integer sums are equal on any device, in any order."""


@dataclass(frozen=True)
class Filters:
    """How the logits of a position become the distribution that its code is drawn from.

    Attributes:
        temperature: the logits are divided by it; a schedule has one value for each latent frame of the video, and
            later frames use its last value.
        top_k: keep the k most likely codes, and ties with the k-th. None keeps all.
        top_p: keep the most likely codes until their probabilities sum to this, and ties with the last of them
            (nucleus sampling, arXiv 1904.09751). Probabilities are renormalised after top_k. 1 keeps all.
        min_p: keep codes whose probability is at least this share of the most likely code's (arXiv 2407.01082). 0
            keeps all.
    """

    temperature: float | tuple[float, ...] = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def temperatures(self, first_frame: int, num_frames: int) -> list[float]:
        """Temperatures of ``num_frames`` latent frames, from ``first_frame`` on."""
        schedule = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        return [schedule[min(first_frame + frame, len(schedule) - 1)] for frame in range(num_frames)]

    def keep(self, logits: Tensor) -> Tensor:
        """Sets the logits of codes that are filtered out to -inf. Logits are float [..., K], after the temperature."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = _at_least(logits, logits.topk(self.top_k).values[..., -1:])
        if self.top_p < 1:
            ordered = logits.sort(descending=True).values
            units = ordered.softmax(-1).mul_(_UNITS).long()
            before = units.cumsum(-1).sub_(units)
            # Keep at least one code, even if the logits are not finite.
            num_kept = (before < int(self.top_p * _UNITS)).sum(-1, keepdim=True).clamp_(min=1)
            logits = _at_least(logits, ordered.gather(-1, num_kept - 1))
        if self.min_p > 0:
            logits = _at_least(logits, logits.amax(-1, keepdim=True) + math.log(self.min_p))
        return logits


def _at_least(logits: Tensor, smallest: Tensor) -> Tensor:
    return logits.masked_fill(logits < smallest, -torch.inf)


def draw(logits: Tensor, noise: Tensor, filters: Filters) -> Tensor:
    """Codes int64 [...]: argmax of the kept logits plus noise, which draws from their softmax (Gumbel-max).

    Args:
        logits: float32 [..., K], already divided by the temperature.
        noise: standard Gumbel noise, float32 [..., K].
        filters: which codes are kept.
    """
    return filters.keep(logits).add(noise).argmax(-1)
