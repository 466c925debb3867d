"""The section ``sample`` of a config as arguments of the draw, and how videos are stored: for the stage and Python."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from clipmill.config import SampleConfig
from clipmill.models.prior import Prior
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.kept import Kept
from clipmill.sampling.long import DrawWindow

__all__ = ["CRF", "USUAL_FPS", "decoder_for", "draw_by"]

CRF = 10
"""Constant rate factor of videos as mp4: their loss is far below a tokenizer's."""
USUAL_FPS = 8.0
"""Frames per second of videos whose training clips kept their videos' own rates: slow enough to judge motion by."""
PARALLEL_SAMPLES = 1
"""Largest batch that a CPU draws faster in parallel than sequentially."""


def draw_by(
    settings: SampleConfig,
    prior: Prior,
    indices: Sequence[int],
    labels: Tensor | None,
    kept: Kept,
    on_progress: Callable[[int], None] | None = None,
) -> DrawWindow:
    """What draws the windows of a batch.

    Args:
        settings: of the draw.
        prior: in eval mode.
        indices: of the samples.
        labels: class of each, int64 [B], for a prior with classes.
        kept: of the prior, for all its batches.
        on_progress: see `generate`.
    """
    return functools.partial(
        generate,
        prior,
        seed=settings.seed,
        indices=indices,
        labels=labels,
        guidance=settings.guidance,
        filters=Filters(settings.temperature, settings.top_k, settings.top_p, settings.min_p),
        decoder=decoder_for(settings.decoder, len(indices), prior.head.weight.device.type),
        precision=settings.precision,
        on_progress=on_progress,
        kept=kept,
    )


def decoder_for(
    decoder: Literal["auto", "sequential", "parallel"], num_samples: int, device: str
) -> Literal["sequential", "parallel"]:
    """The decoder that is meant.

    Args:
        decoder: as set; ``auto`` is the faster one, as far as that was measured (``docs/sampling.md``).
        num_samples: of a batch.
        device: ``cpu`` or ``cuda``.
    """
    if decoder != "auto":
        return decoder
    return "parallel" if device == "cpu" and num_samples <= PARALLEL_SAMPLES else "sequential"
