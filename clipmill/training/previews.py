"""Samples that a prior draws while it trains: a few of every class, from the same noise each time.

They go to ``previews/step-NNNNNNNN.png`` and ``.mp4`` in the training folder, to TensorBoard and to W&B.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clipmill.errors import UserError
from clipmill.models.chunks import decode_to_pixels
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.shards.dataset import MixedDataset, ShardDataset, eval_batches
from clipmill.training.validation import film_strips

__all__ = ["Preview", "Samples", "Stopped", "Studio"]

MOST_SAMPLES = 16
SAMPLES_OF_A_CLASS = 2
SAMPLES_WITHOUT_CLASSES = 4
MOST_SEARCHED = 256
"""Validation clips that are searched for some of each class, if the prior has conditions besides the class."""

logger = logging.getLogger(__name__)


class Draw(Protocol):
    """Draws samples 0, 1, ... as the stage ``sample`` would."""

    def __call__(
        self, prior: Prior, num_samples: int, labels: Tensor | None, condition: Tensor | None, on_progress: Any
    ) -> Tensor:
        """Codes int64 [N, t, h, w] or [N, t, h, w, M]."""


class Preview(NamedTuple):
    """A picture, and its clips if they should be playable."""

    picture: np.ndarray
    """uint8 [H, W, 3]."""
    clips: np.ndarray | None = None
    """uint8 [N, T, H, W, 3]."""
    fps: float = 8.0


@dataclass(frozen=True)
class Studio:
    """Draws and encodes, because training imports neither the sampler nor codecs. See `clipmill.studio`."""

    draw: Draw
    encode: Callable[[Preview], dict[str, bytes]]
    """Files by kind: ``png``, and for clips ``mp4``; empty on a machine without codecs."""
    usual_fps: float
    """Frames per second of a film if the videos have their own rates."""


class Stopped(Exception):
    """Raised by ``on_progress``: a stop was requested while samples were drawn."""


@dataclass(frozen=True)
class Samples:
    """The samples that a training shows: some of each class, or one of each of the first `MOST_SAMPLES` classes.

    Attributes:
        every: steps between two previews.
        studio: draws the codes.
        tokenizer: decodes them.
        num_classes: number of classes of the prior; 0 if it has none.
        clips: source of conditions and classes; None for a prior without conditions.
        prepare: see `clipmill.training.job.Job`.
        fps: frames per second of the films.
    """

    every: int
    studio: Studio
    tokenizer: VQVAE
    num_classes: int
    clips: ShardDataset | MixedDataset | None
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    fps: float

    def make(self, prior: Prior, on_progress: Callable[[int], None]) -> Preview | None:
        """Draws and decodes samples. None, with a warning, if the prior cannot be sampled or GPU memory runs out.

        Args:
            prior: with its whole weights on this rank; in eval mode afterwards.
            on_progress: called about once per latent frame; may raise `Stopped`.
        """
        num_samples, labels, condition = self._given
        try:
            codes = self.studio.draw(prior.eval(), num_samples, labels, condition, on_progress)
            clips = decode_to_pixels(self.tokenizer.to(codes.device).eval(), codes, codes.shape[1:4]).numpy()
        except Stopped:
            return None
        except (UserError, torch.OutOfMemoryError) as error:  # must not end the training
            logger.warning("no samples at this step: %s", error)
            return None
        finally:
            self.tokenizer.cpu()
        return Preview(film_strips(clips), clips, self.fps)

    @functools.cached_property
    def _given(self) -> tuple[int, Tensor | None, Tensor | None]:
        """Number N of samples, their classes int64 [N] and their conditions."""
        each = SAMPLES_OF_A_CLASS if self.num_classes * SAMPLES_OF_A_CLASS <= MOST_SAMPLES else 1
        if self.clips is None:
            if not self.num_classes:
                return SAMPLES_WITHOUT_CLASSES, None, None
            labels = torch.arange(min(self.num_classes, MOST_SAMPLES)).repeat_interleave(each)
            return len(labels), labels, None
        searched = {"batch_size": MOST_SEARCHED, "max_samples": MOST_SEARCHED}
        prepared = self.prepare(next(eval_batches(self.clips, rank=0, world_size=1, **searched)))
        rows = prepared["weight"].nonzero().flatten().tolist()
        if not self.num_classes:
            rows = rows[:SAMPLES_WITHOUT_CLASSES]
            return len(rows), None, prepared["condition"][rows]
        classes = prepared["label"].tolist()
        rows = [row for row in rows if classes[:row].count(classes[row]) < each]
        rows = sorted(rows, key=classes.__getitem__)[:MOST_SAMPLES]
        return len(rows), prepared["label"][rows], prepared["condition"][rows]
