"""The bucket half of `clipmill.storage`: an operation on an object store that rides out an outage, or says why not.

Every call is tried again, with growing and random pauses, while the server is away, overloaded or cuts a transfer,
until ``CLIPMILL_STORAGE_RETRY_SECONDS`` (120 unless set) have passed since its first failure. What no repetition can
pass (refused credentials, a bucket that is not there) raises at once and says what to do.

The retries of botocore and s3fs are off: stacked they make 25 attempts where one deadline should rule.

A web server is one of the many that a list of videos names: what it refuses, or has not given by the deadline, is
`Unreadable`, which is no reason to stop.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec

from clipmill.errors import StageFailed, StorageUnavailable, UserError

__all__ = ["ServerLost", "Unreadable", "call", "create", "is_web", "open_to_read"]

RETRY_SECONDS_VARIABLE = "CLIPMILL_STORAGE_RETRY_SECONDS"
DEFAULT_RETRY_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 15.0
CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
"""Between two arrivals of data, so a slow transfer may take as long as it needs."""
QUIET_RETRIES = 3

_BOTOCORE_TRANSPORT_ERRORS = ("ConnectionError", "HTTPClientError", "IncompleteReadError")  # and what derives from them
_S3_PROTOCOLS = ("s3", "s3a")
_WEB_PROTOCOLS = ("http", "https", "ftp")
_CREDENTIALS_ADVICE = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and the bucket's permissions"
_TRANSIENT_CODES = frozenset(
    (
        "BadDigest",
        "ConditionalRequestConflict",  # another create of the same name is under way
        "IncompleteBody",
        "NoSuchUpload",  # a server that restarted may have forgotten a multipart upload; the next attempt begins anew
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "XAmzContentSHA256Mismatch",
    )
)

T = TypeVar("T")
_connecting = threading.Lock()
logger = logging.getLogger(__name__)


class Unreadable(StageFailed, OSError):
    """One object cannot be had, and will not come by waiting; others may."""


class ServerLost(Unreadable):
    """A web server does not answer at all: its other objects cannot be had either."""


class _WebUnavailable(Unreadable, StorageUnavailable):
    """A web server answered, but did not recover in time."""


class _WebLost(ServerLost, StorageUnavailable):
    """A web server did not answer in time."""


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
            filesystem, path = _filesystem(url)
            return operation(filesystem, path)
        except Exception as error:
            reason = _transient_reason(url, error)
            if reason is None:
                raise
            retry_seconds = min(_retry_seconds(), longest_seconds)
            deadline = deadline or time.monotonic() + retry_seconds
            # Half of the pause is random: thousands of workers that lost one server must not return in step.
            pause_seconds = min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
            if time.monotonic() + pause_seconds > deadline:
                if is_web(url):
                    kind = _WebLost if _answer(error)[1] is None else _WebUnavailable
                    raise kind(f"{url}: the server did not recover within {retry_seconds:g} s ({reason})") from error
                raise StorageUnavailable(
                    f"{url}: the storage did not recover within {retry_seconds:g} s ({reason}); check it and "
                    "AWS_ENDPOINT_URL, then run the same command again"
                ) from error
            attempt += 1
            if attempt > QUIET_RETRIES:
                logger.warning("%s: %s; trying again in %.1f s", url, reason, pause_seconds)
            time.sleep(pause_seconds)


def create(url: str, data: bytes) -> bool:
    """Puts an object only if there is none; of several writers of different data exactly one gets True.

    One that is there and equal counts as ours (unless empty: that says nothing about its writer). For the answer to a
    put may be lost, and the HTTP client repeats a put on a connection that broke without telling us.
    """

    def put(filesystem: Any, path: str) -> bool:
        try:
            filesystem.pipe_file(path, data, mode="create")
        except OSError as error:  # s3fs reports If-None-Match as EINVAL, with the server's answer as cause
            if not isinstance(error, FileExistsError) and _answer(error) != ("PreconditionFailed", 412):
                raise
            return data != b"" and filesystem.cat_file(path, max_concurrency=1) == data
        return True

    return call(url, put)


def open_to_read(url: str, block_bytes: int) -> BinaryIO:
    """The object as a file that can be read and sought, in requests of at least ``block_bytes``."""
    if not _is_s3(url):  # a web server may not know ranges: fsspec finds out
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


def _is_s3(url: str) -> bool:
    return urlsplit(url).scheme in _S3_PROTOCOLS


def is_web(url: str) -> bool:
    """Whether the URL names a file of a web server."""
    return urlsplit(url).scheme in _WEB_PROTOCOLS


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a bucket URL, and the object's path in it."""
    with _connecting:
        filesystem = _connected(urlsplit(url).scheme, os.getpid())
    return filesystem, filesystem._strip_protocol(url)


@functools.cache
def _connected(protocol: str, process: int) -> Any:
    """One connected file system a process (it does not survive a fork), shared by its threads.

    fsspec itself would make one a thread, each of which reads botocore's service description again.
    Listings are never cached: other processes write into the same folders.
    """
    arguments: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol not in _S3_PROTOCOLS:
        return fsspec.filesystem(protocol, **arguments)
    arguments["config_kwargs"] = {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "read_timeout": READ_TIMEOUT_SECONDS,
        "retries": {"total_max_attempts": 1},
    }
    filesystem = fsspec.filesystem(protocol, **arguments)
    filesystem.retries = 1
    filesystem.connect()
    return filesystem


# ------------------------------------------------------------------------------------- whose fault it is


def _transient_reason(url: str, error: Exception) -> str | None:
    """One line for what may pass by itself; None: ``error`` is the operation's answer.

    Raises:
        UserError: it never passes by itself.
        Unreadable: it concerns this object alone.
    """
    if is_web(url):
        return _transient_web_reason(url, error)
    code, status = _answer(error)
    names = {type(one).__name__ for one in _chain(error)}
    if code == "InvalidObjectState":
        raise Unreadable(f"{url} is archived; restore it") from error
    if code == "NoSuchBucket":
        bucket = urlsplit(url).netloc
        raise UserError(f"the bucket {bucket} of {url} does not exist; create it, or correct the URL") from error
    if names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        raise UserError(f"{url}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    if _is_s3(url) and (isinstance(error, PermissionError) or status in (401, 403)):
        raise UserError(f"{url}: access denied ({code or _line(error)}); {_CREDENTIALS_ADVICE}") from error
    if isinstance(error, ImportError) or str(error).startswith("Protocol not known"):
        raise UserError(f"cannot open {url}: {_line(error)}; use a local path or an s3:// URL") from error
    if names & {"InvalidBucketName", "ParamValidationError"} or "Invalid endpoint" in str(error):
        raise UserError(f"{url}: {_line(error)}; correct the URL or AWS_ENDPOINT_URL") from error
    if status is not None or code is not None:
        is_transient = code in _TRANSIENT_CODES or status == 429 or (status or 0) >= 500
        return f"{code or 'answer'} (HTTP {status})" if is_transient else None
    if isinstance(error, FileNotFoundError | FileExistsError):
        return None
    return _line(error) if _is_network(error) else None


def _transient_web_reason(url: str, error: Exception) -> str | None:
    """As `_transient_reason`, of a web server. fsspec turns many of its errors into FileNotFoundError."""
    _, status = _answer(error)
    if status is not None and status != HTTPStatus.NOT_FOUND:
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
            return f"HTTP {status}"
        raise Unreadable(f"{url}: the server answers {_status_text(status)}") from error
    for one in _chain(error):
        if getattr(one, "errno", None) == socket.EAI_NONAME:
            raise ServerLost(f"{url}: no such host") from error
    if status is None and _is_network(error):
        return _line(error.__cause__ or error)
    if isinstance(error, ImportError | ValueError):
        raise Unreadable(f"{url}: {_line(error)}") from error
    return None


def _status_text(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _is_network(error: BaseException) -> bool:
    return any(
        isinstance(one, ConnectionError | TimeoutError)
        or type(one).__module__.startswith(("aiohttp", "botocore.httpchecksum"))
        or _is_botocore_transport(one)
        for one in _chain(error)
    )


def _is_botocore_transport(error: BaseException) -> bool:
    return any(
        kind.__module__ == "botocore.exceptions" and kind.__name__ in _BOTOCORE_TRANSPORT_ERRORS
        for kind in type(error).__mro__
    )


def _answer(error: BaseException) -> tuple[str | None, int | None]:
    """(error code, HTTP status) of the server's answer behind an exception, as far as there is one."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return response.get("Error", {}).get("Code"), status
        if isinstance(getattr(one, "status", None), int):  # of a web server
            return None, one.status  # type: ignore[attr-defined]
    return None, None


def _chain(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
