"""Listings of buckets, in the order of keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clipmill.errors import UserError
from clipmill.storage import bucket, pages
from clipmill.storage.entry import Entry
from clipmill.storage.urls import is_web, provider, relative_name, shown

__all__ = ["children", "entry_of", "walk"]


def children(url: str) -> list[tuple[Entry, bool]]:
    """The children of a folder, sorted by name, each with whether it is a folder."""
    try:
        folder, infos = bucket.call(url, lambda filesystem, path: (path, filesystem.ls(path, detail=True)))
    except FileNotFoundError:
        return []
    entries = [(entry_of(info, folder), info["type"] == "directory") for info in infos if not _is_folder_marker(info)]
    return sorted((item for item in entries if item[0].name), key=lambda item: item[0].name)


def walk(url: str, after: str) -> Iterator[Entry]:
    """The objects below a folder whose relative path is greater than ``after``, in key order."""
    if provider(url) == "s3":
        yield from _walk_s3(url, after)
        return
    if is_web(url):
        raise UserError(f"{shown(url)}: files of a web server cannot be listed; name them in a table")
    folder, found = bucket.in_bucket(url, lambda filesystem, path: (path, filesystem.find(path, detail=True)))
    for name in sorted(found):
        if not _is_folder_marker(found[name]):
            entry = entry_of(found[name], folder)
            if entry.name > after:
                yield entry


def _walk_s3(url: str, after: str) -> Iterator[Entry]:
    folder = bucket.s3_folder(url)
    for key, num_bytes, etag, modified in pages.keys(url, folder, folder.prefix + after if after else ""):
        if not _is_marker(key):
            yield Entry(relative_name(key.removeprefix(folder.prefix)), num_bytes, etag, modified)


def _is_marker(key: str) -> bool:
    """Whether an object is a folder marker, as consoles (``clips/``) and Hadoop (``clips_$folder$``) create them."""
    return key.endswith(("/", "_$folder$"))


def _is_folder_marker(info: dict[str, Any]) -> bool:
    return info["type"] == "file" and _is_marker(info["name"])


def entry_of(info: dict[str, Any], folder: str) -> Entry:
    """An fsspec info as an entry of a folder (a path without its protocol)."""
    etag = info.get("ETag") or info.get("etag")
    name = info["name"].removeprefix(folder).strip("/")
    return Entry(name, info.get("size") or 0, etag.strip('"') if etag else None, pages.seconds_of(info))
