"""Reads HDF5 and TFRecord files in a child process.

A hostile file can make their libraries crash, loop or request terabytes. Then only its video is lost, and the worker
survives. Each thread keeps one child, which ends with the thread (`clipmill.video.child`).
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import StageFailed, StorageUnavailable, UserError
from clipmill.pipeline.sources.record import ArrayVideo, DamagedVideo, SourceVideo
from clipmill.storage import Refused, ServerLost, Unreadable
from clipmill.video.child import Child, DecoderLost, Limits, VideoFault

__all__ = ["list_isolated", "read_isolated"]

LISTING_LIMITS = Limits(cpu_seconds=3600, memory_bytes=4 * 2**30, no_progress_seconds=3600)

_ATTEMPTS = 2
"""A file that brings down two children counts as damaged."""
_RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (DamagedVideo, FileNotFoundError, Refused, ServerLost, StorageUnavailable, Unreadable, UserError)
}
"""The exceptions that a child may report instead of a result."""

_thread_state = threading.local()


def list_isolated(source: SourceConfig) -> Iterator[SourceVideo]:
    """Lists a source that is one file.

    Raises:
        UserError: the file exceeds the limits, or does not match the source type.
    """
    name = storage.shown(source.url)
    try:
        messages = _reader(LISTING_LIMITS).ask({"do": "list", "source": source.model_dump(mode="json")})
    except DamagedVideo as damaged:
        raise UserError(f"data.source.url {name} cannot be read: {damaged}") from damaged
    except DecoderLost as lost:
        raise StageFailed(f"data.source.url {name} was not read: {lost}; run the same command again") from lost
    for message in messages:
        for video in message.get("videos", ()):
            yield SourceVideo(**video)


def read_isolated(source: SourceConfig, url: str, member: str, num_bytes: int, limits: Limits) -> ArrayVideo:
    """Reads one video from a file with several.

    Raises:
        DamagedVideo: this part of the file is damaged, exceeds the limits, or has changed since the listing.
        FileNotFoundError: the file is missing.
        DecoderLost: the environment failed.
    """
    asked = {"do": "read", "source": source.model_dump(mode="json"), "url": url, "member": member, "bytes": num_bytes}
    reader = _reader(limits)
    return reader.result(reader.ask(asked)[-1])


def _reader(limits: Limits) -> _Reader:
    """The reader of this thread."""
    reader: _Reader | None = getattr(_thread_state, "reader", None)
    if reader is None or reader.limits != limits:
        reader = _thread_state.reader = _Reader(limits)
    return reader


class _Reader:
    """A child that is started on demand, and replaced after a failure."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this object
        self._child: Child | None = None

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Sends a request and returns the child's messages.

        Raises:
            DamagedVideo: the file brought down two children. Exceptions that the child reports are raised too.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._spool.truncate(0)
                if self._child is None:
                    self._child = Child(self.limits, self._spool.fileno(), "clipmill.pipeline.sources.isolated_child")
                messages = self._child.decode(request, self.limits.no_progress_seconds)
                break
            except VideoFault as fault:
                self._discard()
                if attempt == _ATTEMPTS:
                    raise DamagedVideo(str(fault)) from fault
            except BaseException:  # including interrupts: the child is in the middle of a file
                self._discard()
                raise
        if (raised := messages[-1].get("raised")) is not None:
            raise _RAISED[raised](messages[-1]["cause"])
        return messages

    def result(self, message: dict[str, Any]) -> ArrayVideo:
        """The arrays that the child wrote, as memory maps that are valid until the next request."""
        frames = self._map(np.uint8, message["frames"], 0)
        rows = message["actions"]
        return ArrayVideo(frames, None if rows is None else np.array(self._map(np.float32, rows, frames.nbytes)))

    def _map(self, dtype: Any, shape: list[int], offset: int) -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self._spool, dtype, "r", offset, tuple(shape))

    def _discard(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def __del__(self) -> None:
        self._discard()
