"""The bucket half of `clipmill.storage`: operations on an object store, with retries.

While the server is unreachable, overloaded or cuts transfers, a call is retried with growing random pauses, until
``CLIPMILL_STORAGE_RETRY_SECONDS`` (default 120) have passed since its first failure. Errors that no retry can cure
(refused credentials, a missing bucket) raise at once and say what to do.

A list of videos may name many web servers. A file that one of them refuses, or does not deliver by the deadline, is
`Unreadable`; the caller skips it and continues. A single `Refused` object of a bucket is skipped too. If a second
object is refused, the credentials or the bucket are wrong.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, BinaryIO, NamedTuple, TypeVar

from clipmill.errors import StorageUnavailable, UserError
from clipmill.storage.connection import connect
from clipmill.storage.failures import (
    NO_BUCKET,
    Refused,
    Unreadable,
    WebLost,
    WebUnavailable,
    server_answer,
    transient_reason,
)
from clipmill.storage.retries import RetryBudget
from clipmill.storage.urls import is_web, join, provider, server, shown

__all__ = ["S3Folder", "call", "check_create", "create", "in_bucket", "open_to_read", "s3_folder"]

QUIET_RETRIES = 3

T = TypeVar("T")
logger = logging.getLogger(__name__)


def call(url: str, operation: Callable[[Any, str], T], *, longest_seconds: float = math.inf) -> T:
    """Runs ``operation(file system, path)`` on a bucket URL; it must be safe to repeat.

    Args:
        url: of an object or folder.
        operation: what to do with it.
        longest_seconds: upper limit of the time for retries, even where the user allows more.

    Raises:
        UserError: the URL, the credentials or the bucket are wrong.
        StorageUnavailable: the server did not recover in time.
        Refused: access to the object is denied, or its bucket does not exist; others may be readable.
        Unreadable: a web server refuses the object, or did not recover in time; or the object is archived.
        FileNotFoundError, FileExistsError: the operation's own answers.
    """
    budget = RetryBudget(url, longest_seconds)
    while True:
        try:
            filesystem, path = connect(url)
            result = operation(filesystem, path)
            budget.succeeded()
            return result
        except Exception as error:
            reason = transient_reason(url, error)
            if reason is None:
                raise
            pause_seconds = budget.next_pause(error)
            if pause_seconds is None:
                raise _outage(url, error, f"did not recover within {budget.seconds:g} s ({reason})") from error
            if budget.num_pauses >= QUIET_RETRIES:
                logger.warning("%s: %s; trying again in %.1f s", shown(url), reason, pause_seconds)
            budget.wait(pause_seconds)


def _outage(url: str, error: BaseException, what: str) -> StorageUnavailable:
    if is_web(url):
        kind = WebLost if server_answer(error)[1] is None else WebUnavailable
        return kind(f"{shown(url)}: the server {what}")
    setting = " and AWS_ENDPOINT_URL" if provider(url) == "s3" else ""
    advice = f"check it{setting}, then run the same command again"
    return StorageUnavailable(f"{shown(url)}: the storage {what}; {advice}")


class S3Folder(NamedTuple):
    """A bucket, and the prefix of the keys of a folder in it."""

    bucket: str
    prefix: str


def s3_folder(url: str) -> S3Folder:
    """The folder that an ``s3://`` URL names."""
    filesystem, path = connect(url)
    bucket, key, _ = filesystem.split_path(path)
    return S3Folder(bucket, f"{key}/" if key else "")


def create(url: str, data: bytes) -> bool:
    """Creates an object only if none exists. Of several writers of different data exactly one gets True.

    If a put's reply is lost, or the HTTP client silently repeats the put on a broken connection, the retry finds
    identical bytes and counts as a success. Competing writers must therefore write different bytes. An empty object
    never counts: it does not identify its writer.
    """

    def put(filesystem: Any, path: str) -> bool:
        try:
            filesystem.pipe_file(path, data, mode="create")
        except OSError as error:  # s3fs reports If-None-Match as EINVAL, with the server's answer as cause
            if not isinstance(error, FileExistsError) and server_answer(error) != ("PreconditionFailed", 412):
                raise
            return data != b"" and filesystem.cat_file(path, max_concurrency=1) == data
        return True

    return in_bucket(url, put)


def in_bucket(url: str, operation: Callable[[Any, str], T]) -> T:
    """Like `call`, for puts and listings, for which "not found" can only mean that the bucket does not exist.

    Raises:
        Refused: the bucket does not exist.
    """
    try:
        return call(url, operation)
    except FileNotFoundError as error:  # gcsfs raises it for any answer 404
        raise Refused(NO_BUCKET.format(server(url), shown(url))) from error


def check_create(folder_url: str) -> None:
    """Checks that the storage honours exclusive creation, so that `create` has one winner.

    Raises:
        UserError: the storage overwrites an existing object.
    """
    url = join(folder_url, f"probe-{uuid.uuid4().hex}")
    try:
        is_fenced = create(url, b"first") and not create(url, b"second")
    finally:
        with contextlib.suppress(FileNotFoundError):
            call(url, lambda filesystem, path: filesystem.rm_file(path))
    if not is_fenced:
        raise UserError(
            f"{folder_url}: this storage ignores If-None-Match, so two runs could own one folder; upgrade it, or use "
            "storage that creates exclusively (docs/storage.md lists some)"
        )


def open_to_read(url: str, block_bytes: int) -> BinaryIO:
    """The object as a file that can be read and sought, in requests of at least ``block_bytes``."""
    if provider(url) != "s3" and not is_web(url):
        return call(url, lambda filesystem, path: filesystem.open(path, "rb", block_size=block_bytes))
    info = call(url, lambda filesystem, path: filesystem.info(path))
    version = [info["ETag"]] if provider(url) == "s3" and info.get("ETag") else []
    return io.BufferedReader(_Ranges(url, info["size"], version), block_bytes)


class _Ranges(io.RawIOBase):
    """An object read range by range. Each range is a separate `call`, because fsspec's own files have no deadline.

    All ranges belong to one version of the object: once the object has been replaced, a read raises `Unreadable`.

    Args:
        url: URL of the object.
        size: size in bytes.
        version: tags of the version; an empty list takes the tags of the first range.
    """

    def __init__(self, url: str, size: int, version: list[str]) -> None:
        self._url, self._size, self._version, self._position = url, size, version, 0

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
        data = call(self._url, lambda filesystem, path: self._range(filesystem, path, start, end))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _range(self, filesystem: Any, path: str, start: int, end: int) -> bytes:
        try:
            data: bytes = filesystem.cat_file(path, start=start, end=end, version=self._version)
        except OSError as error:
            if server_answer(error)[1] != HTTPStatus.PRECONDITION_FAILED:
                raise
            raise Unreadable(f"{shown(self._url)} was replaced while it was read") from error
        return data
