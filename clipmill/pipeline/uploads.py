"""Uploads the finished shards of a unit while the next ones are made."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from clipmill.lease import Lease
from clipmill.pipeline.ahead import longest_wait
from clipmill.shards.commits import publish_part
from clipmill.shards.format import Part

__all__ = ["Uploads"]

_AT_ONCE = 4
"""Parallel uploads, because one stream does not fill the link to a bucket."""


class Uploads:
    """Background uploads of one unit's shards to the data set's folder. A killed worker leaves them there as orphans.

    Args:
        url: the data set's folder.
        lease: lease of the stage, checked before each shard.
    """

    def __init__(self, url: str, lease: Lease) -> None:
        self._url, self._lease = url, lease
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload")
        self._begun: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait(self._begun, longest_wait(kind))

    def begin(self, parts: Sequence[Part]) -> None:
        """Starts the uploads of the finished parts that have not been started yet.

        Args:
            parts: all finished parts of the unit so far.

        Raises:
            OSError, StageFailed: an earlier upload failed.
        """
        for upload in self._begun:
            if upload.done():
                upload.result()
        self._begun += [self._pool.submit(self._publish, part) for part in parts[len(self._begun) :]]

    def wait(self) -> None:
        """Waits for all uploads.

        Raises:
            OSError, StageFailed: an upload failed.
        """
        for upload in self._begun:
            upload.result()

    def _publish(self, part: Part) -> None:
        self._lease.check()
        publish_part(self._url, part)
