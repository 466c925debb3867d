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
        """At most so many samples of a data set (none: all), as `eval_batches` picks them.

        Args:
            manifest: of the data set.
            decode: makes fields of a sample's members.
            most: samples to read.

        Yields:
            Batches: numpy arrays [B, ...], lists of B of what is no array.
        """
        dataset = ShardDataset(manifest, decode)
        for batch in eval_batches(dataset, batch_size=self._batch_size, rank=0, world_size=1, max_samples=most):
            rows = np.flatnonzero(batch["weight"].numpy() > 0)
            yield {
                name: values.numpy()[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
                for name, values in batch.items()
            }
            self._done += len(rows)
            self._progress.update(self._done)
