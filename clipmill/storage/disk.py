"""The local half of `clipmill.storage`: listings of folders, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from clipmill.storage.entry import Entry
from clipmill.storage.urls import escape_name, unescape

__all__ = ["TEMPORARY_PREFIX", "children", "create", "publish", "walk"]

TEMPORARY_PREFIX = ".tmp-"
"""Start of the names of unfinished local files; a killed writer leaves one behind, ``verify`` names it."""


def children(folder: Path) -> list[tuple[Entry, bool]]:
    """Regular files and folders, and whether each is a folder, in the order of `walk`.

    A FIFO, socket, or dangling or circular link has no content to read.
    """
    found = []
    try:
        with os.scandir(folder) as items:
            for item in items:
                if item.is_symlink() and not os.path.exists(item.path):
                    continue
                name = escape_name(item.name)
                if item.is_dir():
                    found.append((Entry(name, 0, None, None), True))
                elif item.is_file():
                    stat = item.stat()
                    found.append((Entry(name, stat.st_size, None, stat.st_mtime), False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    # As in a bucket, where ``a-b`` comes before ``a/c``: the order of whole paths.
    return sorted(found, key=lambda child: child[0].name + "/" if child[1] else child[0].name)


def walk(folder: Path, after: str, prefix: str = "", above: tuple[os.stat_result, ...] = ()) -> Iterator[Entry]:
    """The files below a folder whose path is greater than ``after``, in the order of their paths."""
    inside = children(folder)
    if not inside:
        return
    here = folder.stat()
    if any(os.path.samestat(here, ancestor) for ancestor in above):
        return  # a link back up: its files have been listed where they are
    for child, is_folder in inside:
        path = prefix + child.name
        if not is_folder:
            if path > after:
                yield Entry(path, child.bytes, None, child.modified)
        elif path + "/" > after or after.startswith(path + "/"):
            yield from walk(folder / unescape(child.name), after, path + "/", (*above, here))


def publish(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a whole file, replacing one that is there."""
    with _temporary_beside(target, write) as temporary:
        os.replace(temporary, target)
    _sync_folder(target.parent)


def create(target: Path, data: bytes) -> bool:
    """Writes a whole file only if there is none: returns whether ours was written."""
    try:
        with _temporary_beside(target, lambda file: file.write(data)) as temporary:
            os.link(temporary, target)  # unlike rename it fails on an existing name; the content is already whole
    except FileExistsError:
        return False
    _sync_folder(target.parent)
    return True


@contextlib.contextmanager
def _temporary_beside(target: Path, write: Callable[[BinaryIO], Any]) -> Iterator[str]:
    """A finished and synced file in the target's folder; gone at the end unless it was renamed, also on a full disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide published data from other users
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
