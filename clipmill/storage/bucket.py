"""The bucket half of `clipmill.storage`: an operation on an object store that rides out an outage, or says why not.

Every call is tried again, with growing and random pauses, while the server is away, overloaded or cuts a transfer,
until ``CLIPMILL_STORAGE_RETRY_SECONDS`` (120 unless set) have passed since its first failure. What no repetition can
pass (refused credentials, a bucket that is not there) raises at once and says what to do.

A web server is one of the many that a list of videos names: what it refuses, or has not given by the deadline, is
`Unreadable`, which is no reason to stop.
"""

from __future__ import annotations

import io
import logging
import math
import os
import random
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, TypeVar

from clipmill.errors import StorageUnavailable, UserError
from clipmill.storage.blame import S3_SCHEMES, WebLost, WebUnavailable, answer, transient_reason
from clipmill.storage.connection import connect
from clipmill.storage.urls import is_web, scheme

__all__ = ["S3Folder", "call", "create", "open_to_read", "s3_folder"]

RETRY_SECONDS_VARIABLE = "CLIPMILL_STORAGE_RETRY_SECONDS"
DEFAULT_RETRY_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 15.0
QUIET_RETRIES = 3

T = TypeVar("T")
logger = logging.getLogger(__name__)


def call(url: str, operation: Callable[[Any, str], T], *, longest_seconds: float = math.inf) -> T:
    """Runs ``operation(file system, path)`` on a bucket URL; it must be safe to repeat.

    Args:
        url: of an object or folder.
        operation: what to do with it.
        longest_seconds: repeats it no longer than this, even where users allow more.

    Raises:
        UserError: the URL, the credentials or the bucket are wrong.
        StorageUnavailable: the server did not recover in time.
        Unreadable: a web server refuses the object, or did not recover in time; or the object is archived.
        FileNotFoundError, FileExistsError: the operation's own answers.
    """
    deadline = 0.0
    attempt = 0
    while True:
        try:
            filesystem, path = connect(url)
            return operation(filesystem, path)
        except Exception as error:
            reason = transient_reason(url, error)
            if reason is None:
                raise
            retry_seconds = min(_retry_seconds(), longest_seconds)
            deadline = deadline or time.monotonic() + retry_seconds
            # Half of the pause is random: thousands of workers that lost one server must not return in step.
            pause_seconds = min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
            if time.monotonic() + pause_seconds > deadline:
                if is_web(url):
                    kind = WebLost if answer(error)[1] is None else WebUnavailable
                    raise kind(f"{url}: the server did not recover within {retry_seconds:g} s ({reason})") from error
                raise StorageUnavailable(
                    f"{url}: the storage did not recover within {retry_seconds:g} s ({reason}); check it and "
                    "AWS_ENDPOINT_URL, then run the same command again"
                ) from error
            attempt += 1
            if attempt > QUIET_RETRIES:
                logger.warning("%s: %s; trying again in %.1f s", url, reason, pause_seconds)
            time.sleep(pause_seconds)


class S3Folder(NamedTuple):
    """A bucket, and what the keys of a folder in it begin with."""

    bucket: str
    prefix: str


def s3_folder(url: str) -> S3Folder:
    """The folder that an ``s3://`` URL names."""
    filesystem, path = connect(url)
    bucket, key, _ = filesystem.split_path(path)
    return S3Folder(bucket, f"{key}/" if key else "")


def create(url: str, data: bytes) -> bool:
    """Puts an object only if there is none; of several writers of different data exactly one gets True.

    One that is there and equal counts as ours (unless empty: that says nothing about its writer). For the answer to a
    put may be lost, and the HTTP client repeats a put on a connection that broke without telling us.
    """

    def put(filesystem: Any, path: str) -> bool:
        try:
            filesystem.pipe_file(path, data, mode="create")
        except OSError as error:  # s3fs reports If-None-Match as EINVAL, with the server's answer as cause
            if not isinstance(error, FileExistsError) and answer(error) != ("PreconditionFailed", 412):
                raise
            return data != b"" and filesystem.cat_file(path, max_concurrency=1) == data
        return True

    return call(url, put)


def open_to_read(url: str, block_bytes: int) -> BinaryIO:
    """The object as a file that can be read and sought, in requests of at least ``block_bytes``."""
    if scheme(url) not in S3_SCHEMES:  # a web server may not know ranges: fsspec finds out
        return call(url, lambda filesystem, path: filesystem.open(path, "rb", block_size=block_bytes))
    size = call(url, lambda filesystem, path: filesystem.info(path)["size"])
    return io.BufferedReader(_Ranges(url, size), block_bytes)


class _Ranges(io.RawIOBase):
    """An object read range by range, each a `call` of its own: fsspec's own files know no deadline."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        data = call(self._url, lambda filesystem, path: filesystem.cat_file(path, start=start, end=end))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _retry_seconds() -> float:
    text = os.environ.get(RETRY_SECONDS_VARIABLE, "")
    try:
        return float(text or DEFAULT_RETRY_SECONDS)
    except ValueError as error:
        raise UserError(f"{RETRY_SECONDS_VARIABLE}={text} is not a number of seconds; correct or unset it") from error
