"""Draws codes from a prior; each sample has its own noise.

Sample i is a function of (prior, settings, seed, i). The code at a position is the argmax of its filtered logits plus
Gumbel noise, a function of (seed, i, position, code). It depends neither on the other samples of the batch nor on the
order of the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from clipmill.models.prior import Prior
from clipmill.sampling.filters import Filters
from clipmill.sampling.kept import DrawingSettings, Kept
from clipmill.sampling.noise import Noise
from clipmill.sampling.parallel import WINDOW, decode_in_parallel
from clipmill.sampling.sequential import decode_sequentially

__all__ = ["generate"]


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
    decoder: Literal["sequential", "parallel"] = "sequential",
    precision: Literal["float32", "bfloat16"] = "float32",
    first_frame: int = 0,
    on_progress: Callable[[int], None] | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Draws the codes of samples ``indices``.

    Args:
        prior: in eval mode.
        seed: 0 .. 2^64 - 1.
        indices: numbers of the samples; a sample's codes do not depend on the others of the batch, but logits differ by
            rounding (below 1e-5 in float32) between batch sizes.
        labels: class of each sample, int64 [B], for a class-conditional prior.
        condition: conditioning beyond the class (see `clipmill.models.conditioning`).
        prefix: the first latent frames, taken as given, int64 [B, n, h, w] or [B, n, h, w, M].
        guidance: classifier-free guidance (arXiv 2207.12598): ``without + guidance * (with - without)``, logits with
            and without class and condition. A value other than 1 needs a prior trained with dropout of one of them.
        filters: None draws from the prior's own distribution.
        decoder: both draw the same codes, up to rounding; ``parallel`` needs fewer passes through the prior, each over
            many positions.
        precision: dtype of weights, activations and cache.
        first_frame: latent frame of the whole video at which this window begins. Noise and a schedule of
            temperatures depend on the place in the whole video.
        on_progress: called about once a latent frame, with the number of positions drawn since the last call.
        kept: caches and compiled steps that later calls of the same sizes and settings reuse. None keeps nothing.

    Returns:
        int64 [B, t, h, w], or [B, t, h, w, M] of a prior over M codebooks.

    Raises:
        UserError: logits of a sample are not finite; the message names it.
    """
    device, num_samples = prior.head.weight.device, len(indices)
    labels, condition, prefix = (None if x is None else x.to(device) for x in (labels, condition, prefix))
    copies, hidden = 1, None
    if guidance != 1.0:
        copies = 2
        labels, condition, hidden = _twice(prior, num_samples, labels, condition)
    step_positions = WINDOW[device.type] if decoder == "parallel" else 1
    settings = DrawingSettings(num_samples, copies, precision, guidance, filters or Filters(), step_positions)
    with (kept or Kept()).drawing(prior, settings, labels, condition, hidden) as drawing:
        noise = Noise(seed, indices, prior.num_codes, device)
        drawing.begin(noise, None if prefix is None else prefix.flatten(1), first_frame, on_progress)
        if decoder == "parallel":
            decode_in_parallel(drawing)
        else:
            decode_sequentially(drawing)
        drawing.require_finite(indices)
        return drawing.codes.view(num_samples, *prior.latent_shape).clone()


def _twice(
    prior: Prior, num_samples: int, labels: Tensor | None, condition: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Labels, condition, and rows with hidden condition, for guidance.

    Each sample takes two rows: first n rows with class and condition, then n rows without those that training dropped.
    """
    if not prior.guidable:
        raise ValueError("guidance needs a prior that was trained with label_dropout or condition_dropout")
    hidden = None
    if labels is not None:
        without = labels if prior.null_label is None else torch.full_like(labels, prior.null_label)
        labels = torch.cat((labels, without))
    if condition is not None:
        condition = torch.cat((condition, condition))
        if prior.config.condition_dropout:
            hidden = torch.arange(2 * num_samples, device=condition.device) >= num_samples
    return labels, condition, hidden
