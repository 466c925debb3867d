"""Data sets in batches of arrays, each sample once, for the measurements of ``evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from clipmill.progress import bar
from clipmill.shards.dataset import Decode, ShardDataset, eval_batches
from clipmill.shards.manifest import Manifest

__all__ = ["Reader", "num_read"]


def num_read(manifest: Manifest, most: int | None) -> int:
    """Samples that are read of a data set where at most ``most`` are wanted; none: all."""
    return manifest.num_samples if most is None else min(most, manifest.num_samples)


class Reader:
    """Reads data sets in order and without padding, and moves the progress bar."""

    def __init__(self, batch_size: int, progress: bar) -> None:
        self._batch_size = batch_size
        self._progress = progress
        self._done = 0

    def read(self, manifest: Manifest, decode: Decode, most: int | None) -> Iterator[dict[str, Any]]:
        """At most so many samples of a data set: an even spread, or the first ones where classes come in turn.

        Args:
            manifest: of the data set.
            decode: makes fields of a sample's members.
            most: samples to read; none: all.

        Yields:
            Batches: numpy arrays [B, ...], lists of B of what is no array.
        """
        remaining = num_read(manifest, most)
        batches = eval_batches(
            ShardDataset(manifest, decode),
            batch_size=self._batch_size,
            rank=0,
            world_size=1,
            max_samples=None if _classes_come_in_turn(manifest) else most,
        )
        while remaining:
            batch = next(batches)
            rows = np.flatnonzero(batch["weight"].numpy() > 0)[:remaining]
            yield {
                name: values.numpy()[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
                for name, values in batch.items()
            }
            remaining -= len(rows)
            self._done += len(rows)
            self._progress.update(self._done)


def _classes_come_in_turn(manifest: Manifest) -> bool:
    """Whether sample i is of class i mod L: of every L-th sample all would be of one class."""
    if manifest.kind != "samples":
        return False
    return "given" not in manifest.recipe or manifest.recipe["sample"]["classes"] is not None
