"""Files of web servers. A list may name thousands of servers, some of them broken.

A server may not report a file's length or ETag, may refuse HEAD but answer GET (signed URLs do), may not support
ranges, or may never end an answer. Missing facts are found with as few bytes as possible, and endless answers are cut
at a limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import ClientResponse, ClientResponseError, ClientSession, ClientTimeout
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from clipmill.storage.entry import Limits
from clipmill.storage.failures import Unreadable
from clipmill.storage.urls import escape, shown

__all__ = ["EDGE_BYTES", "WebFiles", "connected"]

EDGE_BYTES = 64 * 2**10
"""If the server gives no tag, a hash of this many first and last bytes identifies the file."""
STAT_LIMITS = Limits(seconds=300, bytes=2**31)
"""Limits for reading a whole file to find its length."""
UNLIMITED = Limits(seconds=30 * 24 * 3600, bytes=2**60)

_BLOCK_BYTES = 2**20
_HEADERS = {"Accept-Encoding": "identity"}
"""Without this header, the length could be that of a compressed copy."""
_FINAL = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
"""Answers to HEAD that GET would repeat."""
_TOTAL = re.compile(r"bytes (?:[0-9]+-[0-9]+|\*)/([0-9]+)")
_SESSION_OPTIONS: dict[str, Any] = {
    "timeout": ClientTimeout(total=None, sock_connect=10, sock_read=60),
    "requote_redirect_url": False,  # a signature covers the URL as it stands
    "max_line_size": 2**17,  # signed URLs of redirects are long
    "max_field_size": 2**17,
}


class _Answer(NamedTuple):
    """A server's description of a file.

    Attributes:
        bytes: length of the file; None if the server does not report it.
        tag: ETag, or else the modification time; None if the server reports neither.
    """

    bytes: int | None
    tag: str | None


class WebFiles(HTTPFileSystem):
    """fsspec's file system of web servers, with its own way to find a file's length and tag and to copy it."""

    async def _info(self, url: str, limits: Limits = STAT_LIMITS, **_: Any) -> dict[str, Any]:
        """A file's length and tag: from one HEAD if possible, at worst by reading the whole file."""
        session = await self.set_session()
        async with _ends_in_time(url, limits):
            num_bytes, tag = await _ask(session, url)
            if num_bytes is not None and tag is None:
                tag = await _tag_of_edges(session, url, num_bytes)
            if num_bytes is None or tag is None:
                num_bytes, tag = await _read_through(session, url, limits, tag)
        return {"name": url, "type": "file", "size": num_bytes, "ETag": tag}

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, version: list[str] | None = None, **_: Any
    ) -> bytes:
        """Bytes of a file. If the server does not support ranges, the bytes before them are read and dropped.

        ``version`` holds the file's ETag and modification time. An empty list is filled in.
        """
        first, last = start or 0, STAT_LIMITS.bytes if end is None else end
        session = await self.set_session()
        async with _ends_in_time(url, STAT_LIMITS), _get(session, url, first, last) as response:
            if version is not None:
                _check_version(url, response, version)
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                await _skip(response, first)
            return await _read(response, last - first)

    async def _get_file(self, rpath: str, lpath: str, limits: Limits = UNLIMITED, **_: Any) -> None:
        session = await self.set_session()
        with Path(lpath).open("wb") as copy:
            async with _ends_in_time(rpath, limits):
                async for block in _blocks(session, rpath, limits):
                    copy.write(block)


def connected() -> WebFiles:
    """A new client. URLs are sent unchanged, because a signature covers them."""
    return WebFiles(encoded=True, client_kwargs=_SESSION_OPTIONS, use_listings_cache=False, skip_instance_cache=True)


async def _ask(session: ClientSession, url: str) -> _Answer:
    try:
        async with session.head(URL(url, encoded=True), headers=_HEADERS, allow_redirects=True) as response:
            answer = _described(response)
    except ClientResponseError:  # a broken answer to HEAD: some servers send the file with it
        response = None
    if response is not None and response.status in _FINAL:
        response.raise_for_status()
    if response is not None and _has_file(response) and answer.bytes and answer.tag:
        return answer
    async with _get(session, url, 0, 1) as response:
        return _described(response)


def _described(response: ClientResponse) -> _Answer:
    headers = response.headers
    length: str | None = None
    if response.status in (HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        found = _TOTAL.match(headers.get("Content-Range", ""))
        length = found[1] if found else None
    elif headers.get("Content-Encoding", "identity") == "identity":
        length = headers.get("Content-Length")
    modified = headers.get("Last-Modified")
    tag = headers.get("ETag", "").strip('"') or (f"modified:{modified}" if modified else None)
    # A header may hold any bytes; our formats are UTF-8.
    return _Answer(int(length) if length and length.isdigit() else None, escape(tag) if tag else None)


def _check_version(url: str, response: ClientResponse, version: list[str]) -> None:
    """Raises `Unreadable` if both ETag and time of a file changed. One alone may differ between a site's machines."""
    tags = [response.headers[name] for name in ("ETag", "Last-Modified") if name in response.headers]
    if not version:
        version += tags
    elif tags and not set(tags) & set(version):
        raise Unreadable(f"{shown(url)} was replaced while it was read")


def _has_file(response: ClientResponse) -> bool:
    """Whether an answer contains a file or a part of one. Redirects have been followed before."""
    return response.ok and response.status < HTTPStatus.MULTIPLE_CHOICES and response.status != HTTPStatus.NO_CONTENT


def _check_file(response: ClientResponse) -> None:
    """Raises `ClientResponseError` for an answer without a file, even if its HTTP status is not an error."""
    response.raise_for_status()
    if not _has_file(response):
        raise ClientResponseError(response.request_info, response.history, status=response.status)


async def _tag_of_edges(session: ClientSession, url: str, num_bytes: int) -> str | None:
    """A hash of the first and last bytes; None if the file is short or the server does not support ranges."""
    edges = b""
    for first in (0, num_bytes - EDGE_BYTES):
        async with _get(session, url, first, first + EDGE_BYTES) as response:
            if num_bytes <= 2 * EDGE_BYTES or response.status != HTTPStatus.PARTIAL_CONTENT:
                return None
            edges += await _read(response, EDGE_BYTES)
    return _tag(edges)


async def _read_through(session: ClientSession, url: str, limits: Limits, tag: str | None) -> tuple[int, str]:
    num_bytes, start, end = 0, b"", b""
    async for block in _blocks(session, url, limits):
        num_bytes += len(block)
        start += block[: EDGE_BYTES - len(start)]
        end = (end + block)[-EDGE_BYTES:]
    return num_bytes, tag or _tag(start + end)


def _tag(edges: bytes) -> str:
    return f"edges:{hashlib.sha256(edges).hexdigest()}"


@asynccontextmanager
async def _get(session: ClientSession, url: str, start: int, end: int) -> AsyncIterator[ClientResponse]:
    """An answer with these bytes, or with the whole file; status 416 if the file has no such bytes."""
    headers = {**_HEADERS, "Range": f"bytes={start}-{end - 1}"}
    async with session.get(URL(url, encoded=True), headers=headers) as response:
        if response.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            _check_file(response)
        yield response


async def _read(response: ClientResponse, num_bytes: int) -> bytes:
    """The first bytes of an answer. It may have no end, so only these are read."""
    data = bytearray()
    while len(data) < num_bytes and (block := await response.content.read(num_bytes - len(data))):
        data += block
    return bytes(data)


async def _skip(response: ClientResponse, num_bytes: int) -> None:
    while num_bytes and (block := await response.content.read(min(num_bytes, _BLOCK_BYTES))):
        num_bytes -= len(block)


async def _blocks(session: ClientSession, url: str, limits: Limits) -> AsyncIterator[bytes]:
    """The content of a file in blocks. Raises `Unreadable` at the limit."""
    num_bytes = 0
    async with session.get(URL(url, encoded=True), headers=_HEADERS) as response:
        _check_file(response)
        while block := await response.content.read(_BLOCK_BYTES):
            num_bytes += len(block)
            if max(num_bytes, response.content_length or 0) > limits.bytes:
                raise Unreadable(f"{shown(url)} has more than {limits.bytes} bytes (data.fetch_bytes)")
            yield block


@asynccontextmanager
async def _ends_in_time(url: str, limits: Limits) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(limits.seconds) as timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise Unreadable(f"{shown(url)} does not end within {limits.seconds:.0f} s (data.fetch_seconds)") from error
