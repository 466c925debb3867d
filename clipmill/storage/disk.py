"""The local half of `clipmill.storage`: listings of folders, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from clipmill.errors import ClipmillError, DiskUnusable
from clipmill.storage.entry import Entry
from clipmill.storage.urls import escape_name, is_local, local_path, unescape

__all__ = ["TEMPORARY_PREFIX", "children", "create", "disk_errors_explained", "publish", "unusable", "walk"]

TEMPORARY_PREFIX = ".tmp-"
"""Name prefix of unfinished local files. A killed writer leaves one behind; ``verify`` lists it."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


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
    """Writes a whole file; an existing one is replaced."""
    with _temporary_beside(target, write) as temporary:
        os.replace(temporary, target)
    _sync_folder(target.parent)


def create(target: Path, data: bytes) -> bool:
    """Writes a whole file only if none exists. Returns whether it was written."""
    try:
        with _temporary_beside(target, lambda file: file.write(data)) as temporary:
            os.link(temporary, target)  # unlike rename it fails on an existing name; the content is already whole
    except FileExistsError:
        return False
    _sync_folder(target.parent)
    return True


@contextlib.contextmanager
def _temporary_beside(target: Path, write: Callable[[BinaryIO], Any]) -> Iterator[str]:
    """A finished and synced file in the target's folder. It is removed at the end unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file, _naming(target):
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


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Adds the target's name to OSErrors without a file name; a failed write raises such errors."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise


def unusable(error: OSError, root: str | None = None) -> DiskUnusable | None:
    """A one-line error for a disk that is full, read-only or forbidden; None for any other error.

    Args:
        error: the system's error.
        root: URL of a folder that clipmill writes to. It is considered when the error names no file.
    """
    if isinstance(error, ClipmillError) or error.errno not in _FULL + _FORBIDDEN:
        return None
    folders = {Path(tempfile.gettempdir()): "set TMPDIR to another folder"}
    if root is not None and is_local(root):
        folders[local_path(root).absolute()] = "choose another root"
    name = error.filename2 or error.filename  # the second name of a failed copy is its target
    # A failed write names no file. Of the disks that clipmill writes to, the one with less free space is the full one.
    place = Path(os.fsdecode(name)).absolute() if name else min(folders, key=_free_bytes)
    if place.name.startswith(TEMPORARY_PREFIX):  # the user has never seen this temporary name
        place = place.parent
    inside = [folder for folder in folders if place.is_relative_to(folder)]
    advice = folders[max(inside, key=lambda folder: len(folder.parts))] if inside else "use another folder"
    reason = os.strerror(error.errno)
    if error.errno in _FORBIDDEN:
        return DiskUnusable(f"{place} cannot be used ({reason}); change its owner or mount it writable, or {advice}")
    free = f"{_free_bytes(place) / 1e6:,.1f} MB are free"
    return DiskUnusable(f"the disk of {place} is full ({reason}; {free}); free some space, or {advice}")


def _free_bytes(place: Path) -> int:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextlib.contextmanager
def disk_errors_explained(root: str) -> Iterator[None]:
    """Inside this context, a disk that is full, read-only or forbidden raises a one-line error instead of a traceback.

    Args:
        root: URL of the folder that is written to, in addition to the temporary folder.

    Raises:
        DiskUnusable: instead of the system's error.
    """
    try:
        yield
    except OSError as error:
        explained = unusable(error, root)
        if explained is None:
            raise
        raise explained from error
