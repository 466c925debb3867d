"""Turns the config section ``sample`` into arguments of `generate`; used by the stage and by the Python API."""

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
"""Constant rate factor of mp4 videos: its loss is far below that of a tokenizer."""
USUAL_FPS = 8.0
"""Frames per second of samples if the training clips have no common rate: slow enough to judge motion by."""
PARALLEL_SAMPLES = 1
"""Largest batch for which the parallel decoder is faster than the sequential one on a CPU."""


def draw_by(
    settings: SampleConfig,
    prior: Prior,
    indices: Sequence[int],
    labels: Tensor | None,
    kept: Kept,
    on_progress: Callable[[int], None] | None = None,
) -> DrawWindow:
    """Returns the function that draws the windows of a batch.

    Args:
        settings: settings of the draw.
        prior: the prior in eval mode.
        indices: indices of the samples.
        labels: class of each sample, int64 [B]; None for a prior without classes.
        kept: state shared by all batches of the prior.
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
    """Resolves ``auto`` to a decoder.

    Args:
        decoder: the setting; ``auto`` chooses the decoder that was measured to be faster (``docs/sampling.md``).
        num_samples: samples in a batch.
        device: ``cpu`` or ``cuda``.
    """
    if decoder != "auto":
        return decoder
    return "parallel" if device == "cpu" and num_samples <= PARALLEL_SAMPLES else "sequential"
