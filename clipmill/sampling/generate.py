"""Draws codes from a prior, each sample from noise of its own.

Sample i is a function of (prior, settings, seed, i): the code at a position is the argmax of its filtered logits plus
Gumbel noise that (seed, i, position, code) alone decides. Neither the other samples of the batch nor the order of the
draws enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipmill.errors import UserError
from clipmill.models.prior import Prior
from clipmill.sampling.filters import Filters, draw
from clipmill.sampling.noise import Noise

__all__ = ["generate"]

_NOISE_ELEMENTS = 2**20
"""Noise made at once: enough to pay for its operations, little enough for a cache."""


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
    filters: Filters | None = None,
    first_frame: int = 0,
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
        filters: None draws from the prior's own distribution.
        first_frame: latent frame of the whole video at which this window of it begins. Noise and a schedule of
            temperatures go by the place in the whole video.

    Returns:
        int64 [B, t, h, w], or [B, t, h, w, M] of a prior over M codebooks.

    Raises:
        UserError: logits of a sample are not finite; the message names it.
    """
    filters = filters or Filters()
    device = prior.head.weight.device
    batch_size, per_frame = len(indices), math.prod(prior.latent_shape[1:])
    noise = Noise(seed, indices, prior.num_codes, device)
    temperatures = filters.temperatures(first_frame, prior.latent_shape[0])
    labels, condition, prefix = (None if x is None else x.to(device) for x in (labels, condition, prefix))
    guided = guidance != 1.0
    if guided:  # each sample twice: with its class, then without
        if labels is None or prior.null_label is None:
            raise ValueError("guidance needs labels and a prior that was trained with label dropout")
        labels = torch.cat((labels, torch.full_like(labels, prior.null_label)))
        condition = None if condition is None else torch.cat((condition, condition))
    cache = prior.new_cache(batch_size * (1 + guided), labels, condition)
    codes = torch.empty(prior.num_positions, batch_size, dtype=torch.int64, device=device)
    health = torch.zeros(batch_size, device=device)
    previous, first = None, 0
    if prefix is not None and prefix.shape[1] > 0:
        prior.prefill(cache, torch.cat((prefix, prefix)) if guided else prefix)
        first = prefix[0].numel()
        codes[:first] = prefix.flatten(1).t()
        previous = codes[first - 1]
    chunk = max(1, _NOISE_ELEMENTS // (batch_size * prior.num_codes))
    for position in range(first, prior.num_positions):
        if (position - first) % chunk == 0:
            chunk_noise = noise.at(first_frame * per_frame + position, min(chunk, prior.num_positions - position))
        logits = prior.step(cache, previous.repeat(2) if guided and previous is not None else previous)
        if guided:
            with_class, without = logits.chunk(2)
            logits = without + guidance * (with_class - without)
        logits = logits / temperatures[position // per_frame]
        health += logits.sum(-1) * 0  # not a number from the first logit on that is not finite
        previous = draw(logits, chunk_noise[(position - first) % chunk], filters)
        codes[position] = previous
    if not (finite := health.isfinite()).all():
        sample = indices[int(finite.logical_not().nonzero()[0])]
        raise UserError(
            f"sample {sample}: the logits of the prior are not finite; its weights are damaged, or "
            "sample.guidance is too large or sample.temperature too small"
        )
    return codes.t().reshape(batch_size, *prior.latent_shape)
