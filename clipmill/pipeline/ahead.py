"""Fetches the next videos of a unit to this machine while one is decoded.

A bucket answers each request after tens of milliseconds and sends one stream at a fraction of the link's speed, so
several videos are fetched at once, up to a number of videos and of bytes on the disk. The result does not depend on
when a video is fetched: the caller takes the videos in order, each with its own error.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from clipmill.config import DataConfig
from clipmill.pipeline.exclusion import exclude_on_error
from clipmill.pipeline.fetch import LocalVideo, fetch_video
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.sidecars import read_sidecars
from clipmill.pipeline.sources.multivideo import KeptFiles

__all__ = ["FetchAhead", "Fetched", "fetch_pool", "longest_wait"]

MOST_VIDEOS = 8
"""Videos being fetched or waiting, in addition to the one that is decoded."""
MOST_BYTES = 2**29
"""Bytes that these may take on the disk. The next video to decode is fetched in any case."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_GIVEN_UP_SECONDS = 0.5
"""A worker that is given up is killed a few seconds later, so waiting any longer would leave its copies on the disk."""


_IN_CHILDREN = {"hdf5", "bair"}
"""Source types for which each reading thread starts its own child process."""


def fetch_pool(data: DataConfig) -> ThreadPoolExecutor:
    """The threads that fetch for one worker."""
    return ThreadPoolExecutor(1 if data.source.type in _IN_CHILDREN else MOST_VIDEOS, thread_name_prefix="fetch-ahead")


def longest_wait(kind: type[BaseException] | None) -> float | None:
    """Seconds to wait for threads at the end of a ``with`` block that ended with an error of this kind.

    None waits until they are done. If the unit is given up, which no `Exception` does, stalled requests are not waited
    for.
    """
    return None if kind is None or issubclass(kind, Exception) else _GIVEN_UP_SECONDS


class Fetched(NamedTuple):
    """A video on this machine, with the facts from its sidecars."""

    video: PlannedVideo
    local: LocalVideo


@dataclass
class _Run:
    """Consecutive videos of one file. Their shared copies are fetched once, and removed after the last one."""

    kept: KeptFiles
    folder: Path
    last: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class FetchAhead:
    """The videos of a unit, in order, each fetched in advance.

    As a context manager it leaves no thread running, unless an interrupt ends it::

        with FetchAhead(pool, config.data, unit.videos, folder) as ahead:
            for index, video in enumerate(unit.videos):
                fetched = ahead.take(index)
                ...
                ahead.release(index)

    Args:
        pool: from `fetch_pool`; outlives the unit.
        data: names the source.
        videos: videos of the unit, in order.
        folder: empty folder for all copies.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, data: DataConfig, videos: Sequence[PlannedVideo], folder: Path
    ) -> None:
        self._pool, self._data, self._videos, self._folder = pool, data, videos, folder
        self._runs = _runs_of(videos, folder)
        self._begun: dict[int, Future[Fetched]] = {}
        self._next = 0
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed = True
        for future in self._begun.values():
            future.cancel()
        wait(self._begun.values(), longest_wait(kind))

    def take(self, index: int) -> Fetched:
        """Waits for a video, and starts to fetch the next ones.

        Raises:
            ExcludedVideo: it cannot be fetched, or a sidecar of it is bad.
            OSError, MemoryError: the environment failed.
        """
        self._begin(index)
        try:
            return self._begun[index].result()
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
        # The copies of later videos may have filled the disk.
        for begun in sorted(self._begun):
            self._discard(begun)
        self._next = index + 1
        return self._fetch(index)

    def release(self, index: int) -> None:
        """Removes the copies of a finished video."""
        self._discard(index)
        if self._runs[index].last == index:
            shutil.rmtree(self._runs[index].folder, ignore_errors=True)

    def _begin(self, index: int) -> None:
        """Starts the fetches that may run while the video with this index is processed."""
        while self._next < len(self._videos) and self._next <= index + MOST_VIDEOS:
            if self._next > index and self._num_bytes(index, self._next) > MOST_BYTES:
                return
            self._begun[self._next] = self._pool.submit(self._fetch, self._next)
            self._next += 1

    def _num_bytes(self, first: int, last: int) -> int:
        """Bytes that the copies of these videos take; spans of one file count once."""
        sizes = {(self._videos[i].url, self._videos[i].member): self._videos[i].bytes for i in range(first, last + 1)}
        return sum(sizes.values())

    def _fetch(self, index: int) -> Fetched:
        video, run = self._videos[index], self._runs[index]
        copies = self._folder / f"video-{index}"
        copies.mkdir(exist_ok=True)
        with run.lock, exclude_on_error("fetch", video.name, self._folder):
            if self._is_closed:
                raise OSError(errno.ECANCELED, "the unit was given up")  # nobody takes it, and the folder is removed
            local = fetch_video(self._data, video, copies, run.kept)
        with exclude_on_error("sidecar", video.name, self._folder):
            return Fetched(read_sidecars(self._data, video), local)

    def _discard(self, index: int) -> None:
        """Removes a video's copies, once its fetch has ended."""
        future = self._begun.pop(index, None)
        if future is not None and not future.cancel():
            future.exception()
        shutil.rmtree(self._folder / f"video-{index}", ignore_errors=True)


def _runs_of(videos: Sequence[PlannedVideo], folder: Path) -> list[_Run]:
    """For each video, the run of consecutive videos that it belongs to."""
    runs: list[_Run] = []
    for index, video in enumerate(videos):
        if index and videos[index - 1].url == video.url:
            run = runs[-1]
            run.last = index
        else:
            shared = folder / f"shared-{index}"
            run = _Run(KeptFiles(shared), shared, index)
        runs.append(run)
    return runs
