"""The section ``sample`` of a config as arguments of the draw, and how videos are stored: for the stage and Python."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from clipmill.config import SampleConfig
from clipmill.models.prior import Prior
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.long import DrawWindow

__all__ = ["CRF", "USUAL_FPS", "draw_by"]

CRF = 10
"""Constant rate factor of videos as mp4: their loss is far below a tokenizer's."""
USUAL_FPS = 8.0
"""Frames per second of videos whose training clips kept their videos' own rates: slow enough to judge motion by."""


def draw_by(
    settings: SampleConfig,
    prior: Prior,
    indices: Sequence[int],
    labels: Tensor | None,
    on_progress: Callable[[int], None] | None = None,
) -> DrawWindow:
    """What draws the windows of a batch.

    Args:
        settings: of the draw.
        prior: in eval mode.
        indices: of the samples.
        labels: class of each, int64 [B], for a prior with classes.
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
        decoder=settings.decoder,
        precision=settings.precision,
        on_progress=on_progress,
    )
