"""Draws codes from a prior, each sample from noise of its own.

Sample i is a function of (prior, settings, seed, i): position p of it uses the p-th uniform of a
counter-based generator (Philox, Salmon et al., SC 2011) keyed by (seed, i), and turns it into a code by
the inverse of the distribution's cumulative sum in float64. Neither the other samples of the batch nor
the order of the draws enter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clipmill.models.prior import Prior

__all__ = ["draw", "generate", "noise"]


@torch.inference_mode()
def generate(
    prior: Prior,
    *,
    seed: int,
    indices: Sequence[int],
    labels: Tensor | None = None,
    condition: Tensor | None = None,
    prefix: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """Draws the codes of samples ``indices``; nothing in the loop waits for the device.

    Args:
        prior: in eval mode.
        seed: 0 .. 2^64 - 1.
        indices: numbers of the samples; a batch of any composition gives each the same codes, up to logits
            that differ by rounding (below 1e-5) between batch sizes.
        labels: class of each sample, int64 [B], for a class-conditional prior.
        condition: what else the prior is told of each sample (see `clipmill.models.conditioning`).
        prefix: the first latent frames, taken as given, int64 [B, n, h, w] or [B, n, h, w, M].
        guidance: logits become ``none + guidance * (class - none)`` of those without and with the class (arXiv
            2207.12598); other than 1 needs a prior that knows the null label.
        temperature: divides the logits.
        top_k: keep the so many likeliest codes (and those tied with the last of them).
        top_p: keep the fewest likeliest codes whose probabilities sum to this.

    Returns:
        int64 [B, t, h, w], or [B, t, h, w, M] of a prior over M codebooks.
    """
    device = prior.head.weight.device
    batch_size = len(indices)
    uniforms = torch.from_numpy(noise(seed, indices, prior.num_positions)).to(device)  # [L, B]
    labels, condition, prefix = (None if x is None else x.to(device) for x in (labels, condition, prefix))
    guided = guidance != 1.0
    if guided:  # each sample twice: with its class, then without
        if labels is None or prior.null_label is None:
            raise ValueError("guidance needs labels and a prior that was trained with label dropout")
        labels = torch.cat((labels, torch.full_like(labels, prior.null_label)))
        condition = None if condition is None else torch.cat((condition, condition))
    cache = prior.new_cache(batch_size * (1 + guided), labels, condition)
    codes = torch.empty(prior.num_positions, batch_size, dtype=torch.int64, device=device)
    previous, first = None, 0
    if prefix is not None and prefix.shape[1] > 0:
        prior.prefill(cache, torch.cat((prefix, prefix)) if guided else prefix)
        first = prefix[0].numel()
        codes[:first] = prefix.flatten(1).t()
        previous = codes[first - 1]
    for position in range(first, prior.num_positions):
        logits = prior.step(cache, previous.repeat(2) if guided and previous is not None else previous)
        if guided:
            with_class, without = logits.chunk(2)
            logits = without + guidance * (with_class - without)
        previous = draw(logits, uniforms[position], temperature=temperature, top_k=top_k, top_p=top_p)
        codes[position] = previous
    return codes.t().reshape(batch_size, *prior.latent_shape)


def noise(seed: int, indices: Sequence[int], num_positions: int) -> np.ndarray:
    """Uniforms in [0, 1), float64 [num_positions, len(indices)]; column j depends on (seed, indices[j]) alone."""
    # The raw words: numpy promises these for ever, the numbers that its Generator makes of them only for a version.
    words = [np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(num_positions) for index in indices]
    return (np.stack(words, 1) >> np.uint64(11)) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Codes int64 [B] for uniforms float64 [B], by the inverse of the filtered cumulative distribution.

    Args:
        logits: float [B, K].
        uniform: in [0, 1), one for each row.
        temperature: see `generate`, as the other two.
        top_k: see `generate`.
        top_p: see `generate`.
    """
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # enough probability lies before such a code
        probabilities = ordered.masked_fill(beyond, 0).gather(-1, order.argsort(-1))
    cumulative = probabilities.cumsum(-1)
    # A code owns [sum before it, sum with it): a code of probability 0 owns nothing.
    threshold = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
