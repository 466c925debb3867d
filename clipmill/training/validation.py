"""Validation during a training: scores of a data set, and a picture of clips with their reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipmill.shards.dataset import MixedDataset, ShardDataset, eval_batches
from clipmill.training.means import WeightedMeans
from clipmill.training.zero.engine import Engine

__all__ = ["Validation", "film_strips", "validate"]

PICTURED_CLIPS = 4
PICTURED_FRAMES = 8
_GAP_PIXELS = 2
_WHITE = 255


class Validation(NamedTuple):
    """Result of a validation; empty if there are no clips."""

    scores: dict[str, float]
    picture: np.ndarray | None
    """uint8 [H, W, 3], on rank 0 if the model reconstructs: see `film_strips`."""


def validate(
    engine: Engine,
    dataset: ShardDataset | MixedDataset,
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    rows: int,
    max_clips: int,
    score_counts: Callable[[dict[str, Tensor]], dict[str, float]] | None,
    on_batch: Callable[[], bool],
) -> Validation | None:
    """Evaluates clips of a data set (see `eval_batches`) with the current weights. Collective.

    Args:
        engine: in training.
        dataset: the clips; may be empty.
        prepare: see `Job`.
        rows: clips per batch.
        max_clips: maximum number of clips.
        score_counts: see `Job`.
        on_batch: called after each batch; if it returns True (on all ranks), the validation ends.

    Returns:
        The result; None if ``on_batch`` ended it.
    """
    num_clips = min(max_clips, len(dataset))
    if num_clips == 0:
        return Validation({}, None)
    world = engine.world
    batches = eval_batches(dataset, batch_size=rows, rank=world.rank, world_size=world.size, max_samples=num_clips)
    means = WeightedMeans()
    counts: dict[str, Tensor] = {}
    pictured = _Pictured()
    for collated in batches:
        batch = engine.to_device(prepare(collated))
        loss, metrics = engine.evaluate(batch)
        reconstruction = metrics.pop("reconstruction", None)
        if reconstruction is not None and world.rank == 0:
            pictured.add(collated, reconstruction)
        for name in [name for name, value in metrics.items() if value.dim()]:
            counts[name] = metrics.pop(name).double() + counts.get(name, 0)
        means.add(batch["weight"].sum(), {"loss": loss, **metrics})
        if on_batch():
            return None
    totals = {name: torch.tensor(world.sum(value.tolist())) for name, value in counts.items()}
    scores = means.fetch(world) | (score_counts(totals) if score_counts else {})
    return Validation(scores, pictured.picture())


class _Pictured:
    """Clips with their reconstructions: the first of each class, and further ones if there are few classes."""

    def __init__(self) -> None:
        self._classes: set[str | None] = set()
        self._firsts: list[tuple[Tensor, Tensor]] = []
        self._others: list[tuple[Tensor, Tensor]] = []

    def add(self, collated: dict[str, Any], reconstructions: Tensor) -> None:
        """Takes the clips of a batch that are still needed; rows without weight are padding."""
        for row, label in enumerate(collated["label"]):
            wanted = self._others if label in self._classes else self._firsts
            if collated["weight"][row] and len(wanted) < PICTURED_CLIPS:
                wanted.append((collated["video"][row], reconstructions[row].cpu()))
                self._classes.add(label)

    def picture(self) -> np.ndarray | None:
        """See `film_strips`; None if the model does not reconstruct."""
        shown = (self._firsts + self._others)[:PICTURED_CLIPS]
        return film_strips(*(torch.stack(kind).numpy() for kind in zip(*shown, strict=True))) if shown else None


def film_strips(*kinds: np.ndarray) -> np.ndarray:
    """A picture of clips: frames from left to right, with those of the reconstruction below them if there is one.

    `clipmill.video.contact_sheet` is not used because a machine that only trains has no codecs.

    Args:
        kinds: clips uint8 [N, T, H, W, 3], optionally followed by their reconstructions, of the same shape.

    Returns:
        uint8 [N rows or 2 N, frames, 3], with white gaps below each clip or pair.
    """
    num_frames = kinds[0].shape[1]
    shown = np.linspace(0, num_frames - 1, min(num_frames, PICTURED_FRAMES)).round().astype(int)
    rows = []
    for clips in zip(*kinds, strict=True):
        rows += [np.concatenate(list(clip[shown]), axis=1) for clip in clips]
        rows.append(np.full((_GAP_PIXELS, *rows[-1].shape[1:]), _WHITE, np.uint8))
    return np.concatenate(rows[:-1])
