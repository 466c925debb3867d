"""Whole-object operations on local paths and buckets."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from clipmill.storage import bucket, disk, listing
from clipmill.storage.entry import Entry, Limits
from clipmill.storage.urls import is_local, is_web, local_path, object_path, split

__all__ = [
    "check_create",
    "create_bytes",
    "exists",
    "fetch",
    "list_folder",
    "list_folders",
    "open_to_read",
    "publish_bytes",
    "publish_file",
    "read_bytes",
    "read_start",
    "remove",
    "remove_tree",
    "stat",
    "walk",
]

WEB_STAT_SECONDS = 15.0
"""A list may name thousands of web servers, some of them dead."""


# ---------------------------------------------------------------------------------------------- reads


def exists(url: str) -> bool:
    """Whether an object or folder is there."""
    if is_local(url):
        return local_path(url).exists()
    return bucket.call(url, lambda filesystem, path: filesystem.exists(path))


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: the object does not exist.
    """
    if is_local(url):
        return local_path(url).read_bytes()
    # With more than one reader s3fs asks for the size first. Documents are small, so one request is enough.
    return bucket.call(url, lambda filesystem, path: filesystem.cat_file(path, max_concurrency=1))


def read_start(url: str, num_bytes: int) -> bytes:
    """The first ``num_bytes`` bytes of the object; all of them if it is shorter.

    Raises:
        FileNotFoundError: the object does not exist.
    """
    if is_local(url):
        with local_path(url).open("rb") as file:
            return file.read(num_bytes)
    return bucket.call(url, lambda filesystem, path: filesystem.cat_file(path, start=0, end=num_bytes))


def open_to_read(url: str, block_bytes: int = 2**16) -> BinaryIO:
    """The object as a file that can be read and sought; from a bucket in requests of at least ``block_bytes``.

    Raises:
        FileNotFoundError: the object does not exist.
    """
    if is_local(url):
        return local_path(url).open("rb")
    return bucket.open_to_read(url, block_bytes)


def stat(url: str) -> Entry:
    """One object, as a listing of its folder would show it.

    Raises:
        FileNotFoundError: the object does not exist, or is a folder, FIFO or socket.
        Unreadable: a web server refuses it or does not answer, or the size is only known after reading the file and the
            file does not end.
    """
    name = url.removeprefix(f"{split(url)[0]}/")
    if is_local(url):
        path = local_path(url)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        status = path.stat()
        return Entry(name, status.st_size, None, status.st_mtime)
    longest_seconds = WEB_STAT_SECONDS if is_web(url) else math.inf
    info = bucket.call(url, lambda filesystem, path: filesystem.info(path), longest_seconds=longest_seconds)
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return replace(listing.entry_of(info, ""), name=name)


def fetch(url: str, path: Path, limits: Limits | None = None) -> None:
    """Copies the whole object into a local file.

    Args:
        url: URL of the object.
        path: path of the copy.
        limits: time and size that a web server may take; None sets no limits.

    Raises:
        FileNotFoundError: the object does not exist.
        Unreadable: it exceeds the limits, or a web server does not deliver it.
    """
    if is_local(url):
        shutil.copyfile(local_path(url), path)
        return
    options = {"limits": limits} if limits is not None and is_web(url) else {}
    bucket.call(url, lambda filesystem, remote: filesystem.get_file(remote, str(path), **options))


def check_create(url: str) -> None:
    """Checks that `create_bytes` has one winner in a folder. Local folders need no check.

    Raises:
        UserError: the storage overwrites an existing object.
    """
    if not is_local(url):
        bucket.check_create(url)


def list_folder(url: str) -> list[Entry]:
    """The objects directly inside a folder, sorted by name; empty if the folder does not exist."""
    return [entry for entry, is_folder in _children(url) if not is_folder]


def list_folders(url: str) -> list[str]:
    """The names of the folders directly inside a folder, sorted; empty if it does not exist."""
    return sorted(entry.name for entry, is_folder in _children(url) if is_folder)


def _children(url: str) -> list[tuple[Entry, bool]]:
    if is_local(url):
        return disk.children(local_path(url))
    return listing.children(url)


def walk(url: str, after: str | None = None) -> Iterator[Entry]:
    """All objects below a folder, in path order. A bucket is listed page by page, in the memory of a few pages.

    The order is that of UTF-8 keys (``a-b``, ``a/c``, ``ab``), the same in a bucket and on a disk. An interrupted
    listing can resume after the last name it gave, also in another process.

    Args:
        url: URL of the folder.
        after: a name that an earlier walk gave; only objects after it are listed. None lists all.
    """
    after = object_path(after or "")
    return disk.walk(local_path(url), after) if is_local(url) else listing.walk(url, after)


# --------------------------------------------------------------------------------------------- writes


def publish_bytes(url: str, data: bytes) -> None:
    """Writes a whole object; an existing one is replaced."""
    if is_local(url):
        disk.publish(local_path(url), lambda file: file.write(data))
    else:
        bucket.in_bucket(url, lambda filesystem, path: filesystem.pipe_file(path, data))


def publish_file(path: Path, url: str) -> None:
    """Copies a finished local file to a URL; an existing object is replaced."""
    if is_local(url):
        with path.open("rb") as original:
            disk.publish(local_path(url), lambda file: shutil.copyfileobj(original, file, 2**20))
    else:
        bucket.in_bucket(url, lambda filesystem, remote: filesystem.put_file(str(path), remote))


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a whole object only if none exists. Of several writers exactly one gets True."""
    if is_local(url):
        return disk.create(local_path(url), data)
    return bucket.create(url, data)


def remove(url: str) -> None:
    """Removes an object, if it exists."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        bucket.call(url, lambda filesystem, path: filesystem.rm_file(path))


def remove_tree(url: str) -> None:
    """Removes everything below a folder, if it exists."""
    if is_local(url):
        shutil.rmtree(local_path(url), ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        bucket.call(url, lambda filesystem, path: filesystem.rm(path, recursive=True))
