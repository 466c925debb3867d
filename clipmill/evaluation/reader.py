"""Reads the clips of a data set that an evaluation measures, by index range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clipmill.shards.dataset import Decode, ShardDataset
from clipmill.shards.manifest import Manifest
from clipmill.shards.places import spread

__all__ = ["Picked", "num_read", "stored_places"]


def num_read(manifest: Manifest, most: int | None) -> int:
    """Number of samples to read from a data set if at most ``most`` are wanted (None reads all)."""
    return manifest.num_samples if most is None else min(most, manifest.num_samples)


def stored_places(manifest: Manifest, most: int | None) -> np.ndarray:
    """Indices, in stored order, of the samples to read: int64 [n].

    If the data set has more than ``most``, these are about one clip per video, from the first video on, because the
    clips of a video are stored next to each other.
    """
    num_taken = num_read(manifest, most)
    if not num_taken:
        return np.zeros(0, np.int64)
    num_spanned = min(manifest.num_samples, math.ceil(num_taken * manifest.clips_per_video))
    return spread(np.arange(num_taken), num_taken, num_spanned)


class Picked:
    """The samples of a data set that are read, in stored order.

    Args:
        manifest: of the data set.
        decode: converts a sample's members to its fields.
        most: maximum number of samples; None reads all.
        num_threads: threads that decode ahead; 0 decodes a batch when it is requested.
    """

    def __init__(self, manifest: Manifest, decode: Decode, most: int | None, num_threads: int = 0) -> None:
        self._dataset = ShardDataset(manifest, _undecoded)
        self._decode = decode
        self._places = stored_places(manifest, most)
        self._num_threads = num_threads

    def batches(self, first: int, stop: int, batch_size: int) -> Iterator[dict[str, Any]]:
        """The samples ``first`` to ``stop - 1``, as batches of ``batch_size``.

        Yields:
            Numpy arrays [B, ...]; values that are not arrays as lists of length B.
        """
        cuts = [(start, min(start + batch_size, stop)) for start in range(first, stop, batch_size)]
        if not cuts:
            return
        if not self._num_threads:
            yield from (_collate([self._read(index) for index in range(*cut)]) for cut in cuts)
            return
        with ThreadPoolExecutor(self._num_threads) as threads:

            def begin(cut: tuple[int, int]) -> list[Future[dict[str, Any]]]:
                # Shards are opened in this thread, because their cache is not thread-safe.
                return [threads.submit(self._decoded, self._members(index)) for index in range(*cut)]

            ahead = begin(cuts[0])
            for number in range(len(cuts)):
                batch = ahead
                if number + 1 < len(cuts):  # decoded while the caller works on this batch
                    ahead = begin(cuts[number + 1])
                yield _collate([sample.result() for sample in batch])

    def _read(self, index: int) -> dict[str, Any]:
        return self._decoded(self._members(index))

    def _members(self, index: int) -> dict[str, Any]:
        return self._dataset[int(self._places[index])]

    def _decoded(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**self._decode(sample["members"]), "key": sample["key"]}


def _undecoded(members: dict[str, memoryview]) -> dict[str, Any]:
    return {"members": members}


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches the fields that all samples have."""
    shared = [field for field in samples[0] if all(field in sample for sample in samples)]
    batch: dict[str, Any] = {field: [sample[field] for sample in samples] for field in shared}
    return {field: np.stack(values) if isinstance(values[0], np.ndarray) else values for field, values in batch.items()}
