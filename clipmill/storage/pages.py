"""Listings of S3 in key order: serial at first, then several ranges of folders in parallel.

Each page must arrive before the next can be requested, and takes about 100 ms: 100 million keys would take three hours.
Folders, however, can be listed in parallel. A long listing therefore asks which folders follow, splits the remaining
keys into ranges at the folder borders, and lists several ranges ahead. This costs few extra requests: one to find the
borders, and a partly used page at each border. A listing within one folder cannot be split and stays serial.
"""

from __future__ import annotations

import pickle
import queue
import re
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from clipmill.storage import bucket
from clipmill.storage.bucket import S3Folder

__all__ = ["Key", "keys", "seconds_of"]

SERIAL_PAGES = 16
"""Serial pages before each search for folder borders: the first 16,000 keys cost no extra request."""
RANGES = 16
RANGES_AT_ONCE = 8
PAGES_AHEAD = 64
"""Pages of a range that are held ready, compressed to about 30 kB each."""


_NO_XML = re.compile("[\x00-\x1f\x7f-\x9f\ufffe\uffff]")
"""Characters that XML cannot hold. Servers repeat ``StartAfter`` in their XML answer; some (Ceph, moto) answer 500 if
it cannot be written there.
"""


class Key(NamedTuple):
    """One key of a listing."""

    key: str
    bytes: int
    etag: str | None
    modified: float | None


class _Page(NamedTuple):
    keys: list[Key]
    token: str | None
    """Token of the next page; None on the last page."""


def keys(url: str, folder: S3Folder, after: str) -> Iterator[Key]:
    """All keys of a folder after ``after``, in order."""
    serial_pages, num_pages = SERIAL_PAGES, 0
    page = _page(url, folder, StartAfter=after) if after else _page(url, folder)
    while True:
        for key in page.keys:
            if key.key > after:  # some servers ignore StartAfter
                yield key
        token = page.token
        if token is None:
            return
        num_pages += 1
        if num_pages >= serial_pages and page.keys:
            after, num_pages = max(after, page.keys[-1].key), 0
            borders = _borders(url, folder, after)
            if borders:
                yield from _ranges(url, folder, [after, *borders])
                after = borders[-1]
                page = _page(url, folder, StartAfter=after)
                continue
            serial_pages *= 2
        page = _page(url, folder, ContinuationToken=token)


def _page(url: str, folder: S3Folder, **place: str) -> _Page:
    answer = _ask(url, folder.bucket, folder.prefix, place)
    found = [
        Key(item["Key"], item["Size"], item.get("ETag", "").strip('"') or None, seconds_of(item))
        for item in answer.get("Contents", ())
    ]
    return _Page(found, answer["NextContinuationToken"] if answer.get("IsTruncated") else None)


def _ask(url: str, bucket_name: str, prefix: str, place: dict[str, str]) -> dict[str, Any]:
    """One answer. It may begin slightly before ``StartAfter``, which is cut at the first character that XML cannot
    hold.
    """
    if start := _NO_XML.split(place.get("StartAfter", ""))[0]:
        place = {**place, "StartAfter": start}
    elif "StartAfter" in place:
        place = {name: value for name, value in place.items() if name != "StartAfter"}
    answer: dict[str, Any] = bucket.call(url, lambda filesystem, _: filesystem.page(bucket_name, prefix, **place))
    return answer


def seconds_of(item: dict[str, Any]) -> float | None:
    """Modification time in seconds since the epoch, from the fields of S3, Azure (adlfs) or Google (gcsfs); None if
    absent.
    """
    modified = next((item[name] for name in ("LastModified", "last_modified", "mtime") if item.get(name)), None)
    return modified.timestamp() if isinstance(modified, datetime) else None


def _borders(url: str, folder: S3Folder, after: str) -> list[str]:
    """Where to split the keys after ``after``: at most `RANGES` strings, each greater than all keys of a folder.

    The folders are the siblings of the folder that holds ``after``, on the highest level that has several.
    """
    parts = after.removeprefix(folder.prefix).split("/")
    for depth in range(len(parts)):
        prefix = folder.prefix + "".join(f"{part}/" for part in parts[:depth])
        answer = _ask(url, folder.bucket, prefix, {"Delimiter": "/", "StartAfter": after})
        ends = [item["Prefix"][:-1] + chr(ord("/") + 1) for item in answer.get("CommonPrefixes", ())]
        keys = [item["Key"] for item in answer.get("Contents", ())]
        if any(end <= after for end in ends) or any(key <= after and not after.startswith(f"{key}/") for key in keys):
            return []  # the server ignores StartAfter: each range would begin at the first key
        if len(ends) > 1:
            step = -(-len(ends) // RANGES)
            return ends[step - 1 :: step]
    return []


def _ranges(url: str, folder: S3Folder, borders: list[str]) -> Iterator[Key]:
    """The keys between the first and the last border, several ranges listed at once."""
    is_closed = threading.Event()
    with ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="listing") as pool:
        listed: list[tuple[queue.Queue[bytes | None], Future[None]]] = []
        for first, last in pairwise(borders):
            pages: queue.Queue[bytes | None] = queue.Queue(PAGES_AHEAD)
            listed.append((pages, pool.submit(_list_range, url, folder, first, last, pages, is_closed)))
        try:
            for pages, listing in listed:
                while (packed := pages.get()) is not None:
                    yield from map(Key._make, pickle.loads(zlib.decompress(packed)))
                listing.result()
        finally:
            is_closed.set()


def _list_range(
    url: str, folder: S3Folder, first: str, last: str, pages: queue.Queue[bytes | None], is_closed: threading.Event
) -> None:
    """Puts the keys after ``first`` up to ``last`` into a queue, followed by None."""
    try:
        page = _page(url, folder, StartAfter=first)
        while not is_closed.is_set():
            found = [tuple(key) for key in page.keys if first < key.key <= last]
            _put(pages, zlib.compress(pickle.dumps(found), 1), is_closed)
            if page.token is None or (page.keys and page.keys[-1].key > last):
                break
            page = _page(url, folder, ContinuationToken=page.token)
    finally:
        _put(pages, None, is_closed)


def _put(pages: queue.Queue[bytes | None], item: bytes | None, is_closed: threading.Event) -> None:
    """Puts an item into the queue, waiting for room; gives up once the consumer has closed the listing."""
    while not is_closed.is_set():
        try:
            pages.put(item, timeout=1)
        except queue.Full:
            continue
        return
