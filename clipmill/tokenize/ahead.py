"""Decodes clips ahead of the encoder, in order.

Threads suffice, because codecs release Python's lock. One thread reads shards (and may download them), the others
decode, so that the encoder finds its next batches ready.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.manifest import Manifest
from clipmill.shards.signatures import signature_of

__all__ = ["Clip", "ClipsAhead"]

BATCHES_AHEAD = 2
"""Number of batches that are read and decoded while the encoder works on one."""
COPIED = ("json", "actions.npy")
"""Members that are copied from clips to tokens unchanged."""


class Clip(NamedTuple):
    """A decoded clip.

    Attributes:
        key: key of the sample.
        video: uint8 [T, H, W, 3].
        copied: members that are copied to its tokens.
        signature: uint8 [F, 16, 16], see `clipmill.shards.signatures`.
    """

    key: str
    video: np.ndarray
    copied: dict[str, bytes]
    signature: np.ndarray


class ClipsAhead:
    """Batches of the clips of some shards, in stored order. A context manager: its threads end with the context.

    Args:
        manifest: manifest of the clips.
        shards: names of the shards to read.
        cache: local folder for the shards of a bucket.
        batch_size: clips in a batch; the last batch may have fewer.
        num_threads: number of decoding threads.

    Attributes:
        wait_seconds: time that the caller has waited for decoded clips.
        decode_seconds: CPU time that all threads together have spent decoding.
    """

    def __init__(
        self, manifest: Manifest, shards: tuple[str, ...], cache: Path, batch_size: int, num_threads: int
    ) -> None:
        self.wait_seconds = 0.0
        self.decode_seconds = 0.0
        self._batch_size = batch_size
        self._members = _members_of(manifest, set(shards), cache)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-clips")
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode-clips")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error, do not wait for a running download.
        for pool in (self._reader, self._decoders):
            pool.shutdown(wait=error is None, cancel_futures=True)

    def __iter__(self) -> Iterator[list[Clip]]:
        """Yields the batches in order.

        Raises:
            UserError: a shard is missing or damaged.
        """
        ahead = deque(self._reader.submit(self._begin_batch) for _ in range(1 + BATCHES_AHEAD))
        while True:
            began = time.perf_counter()
            decoded = [each.result() for each in ahead.popleft().result()]
            self.wait_seconds += time.perf_counter() - began
            if not decoded:
                return
            ahead.append(self._reader.submit(self._begin_batch))
            self.decode_seconds += sum(seconds for _, seconds in decoded)
            yield [clip for clip, _ in decoded]

    def _begin_batch(self) -> list[Future[tuple[Clip, float]]]:
        """Reads the next batch and starts decoding it; empty after the last batch."""
        return [
            self._decoders.submit(_decode, key, members) for key, members in islice(self._members, self._batch_size)
        ]


def _members_of(manifest: Manifest, shards: set[str], cache: Path) -> Iterator[tuple[str, dict[str, memoryview]]]:
    """Yields keys and members of the samples of some shards; fetches and verifies one shard after the other."""
    dataset = ShardDataset(manifest, _undecoded, cache, cache_bytes=1)
    for index, shard in enumerate(manifest.shards):
        if shard.name in shards:
            for row in range(shard.samples):
                sample = dataset.read(index, row)
                yield sample["key"], sample["members"]


def _undecoded(members: dict[str, memoryview]) -> dict[str, Any]:
    return {"members": members}


def _decode(key: str, members: dict[str, memoryview]) -> tuple[Clip, float]:
    """Decodes a clip; also returns the CPU seconds that it took."""
    began = time.thread_time()
    copied = {name: bytes(members[name]) for name in COPIED if name in members}
    video = decode_clip(members)["video"]
    return Clip(key, video, copied, signature_of(video)), time.thread_time() - began
