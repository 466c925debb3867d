"""State that batches of one prior share: weights prepared for decoding, the cache, and on a GPU the CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipmill.models.decoding import CachedPrior
from clipmill.models.prior import Prior
from clipmill.sampling.drawing import Drawing
from clipmill.sampling.filters import Filters

__all__ = ["DrawingSettings", "Kept"]


class DrawingSettings(NamedTuple):
    """Settings that a drawing depends on, besides the prior and the shapes of labels and condition.

    Attributes:
        num_samples: B.
        copies: rows of the prior for each sample: 2 with guidance, else 1.
        precision: name of a torch dtype.
        guidance: see `clipmill.sampling.generate`.
        filters: filters between logits and draws.
        step_positions: positions that a step computes: 1 for the sequential decoder, a window for the parallel one.
    """

    num_samples: int
    copies: int
    precision: str
    guidance: float
    filters: Filters
    step_positions: int


class Kept:
    """Keeps the drawing of the last call for the next one of the same settings.

    The caller that draws several batches of a prior owns it; it holds their memory until it is deleted. While it is in
    use, a call from another thread gets a new drawing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Any = None
        self._drawing: Drawing | None = None

    @contextmanager
    def drawing(
        self,
        prior: Prior,
        settings: DrawingSettings,
        labels: Tensor | None,
        condition: Tensor | None,
        hidden: Tensor | None,
    ) -> Iterator[Drawing]:
        """Yields a drawing with these labels and this condition, ready to begin a batch.

        Args:
            prior: the prior in eval mode.
            settings: settings of the drawing.
            labels: int64 [R]; None for a prior without classes.
            condition: condition of the R rows; None for a prior without a condition.
            hidden: bool [R], rows whose condition is hidden; None hides no row.
        """
        if not self._lock.acquire(blocking=False):
            yield _new_drawing(prior, settings, labels, condition, hidden)
            return
        try:
            key = _key(prior, settings, labels, condition, hidden)
            if self._drawing is not None and key == self._key:
                self._drawing.cached.begin(labels, condition, hidden)
            else:
                self._drawing = self._key = None  # frees its memory first
                self._drawing = _new_drawing(prior, settings, labels, condition, hidden)
                self._key = key
            yield self._drawing
        finally:
            self._lock.release()


def _new_drawing(
    prior: Prior,
    settings: DrawingSettings,
    labels: Tensor | None,
    condition: Tensor | None,
    hidden: Tensor | None,
) -> Drawing:
    dtype = getattr(torch, settings.precision)
    num_rows = settings.copies * settings.num_samples
    step_rows = num_rows * settings.step_positions
    cached = CachedPrior(prior, num_rows, labels, condition, dtype, hidden, step_rows)
    return Drawing(prior, cached, settings.num_samples, settings.guidance, settings.filters)


def _key(prior: Prior, settings: DrawingSettings, *given: Tensor | None) -> Any:
    """Equal for calls that may share a drawing; moving or changing the weights changes it."""
    weights = tuple((weight.data_ptr(), _version(weight)) for weight in prior.parameters())
    return weights, settings, tuple(None if each is None else each.shape for each in given)


def _version(weight: Tensor) -> object:
    """Changes with each in-place operation. Inference tensors do not count these, so theirs never equals another."""
    return object() if weight.is_inference() else weight._version
