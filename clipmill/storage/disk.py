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
"""Start of the names of unfinished local files; a killed writer leaves one behind, ``verify`` names it."""
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
    """Adds the target's name to errors of the system that name no file, as those of a write do."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise


def unusable(error: OSError, root: str | None = None) -> DiskUnusable | None:
    """One line for a disk that is full, read-only or forbidden; None for any other error.

    Args:
        error: of the system.
        root: URL of a folder that may lie on the disk, for an error that names no file.
    """
    if isinstance(error, ClipmillError) or error.errno not in _FULL + _FORBIDDEN:
        return None
    folders = {Path(tempfile.gettempdir()): "set TMPDIR to another folder"}
    if root is not None and is_local(root):
        folders[local_path(root).absolute()] = "choose another root"
    name = error.filename2 or error.filename  # of a copy, the second is the target
    # A write names no file: of the disks that clipmill writes to, the one with less space is full.
    place = Path(os.fsdecode(name)).absolute() if name else min(folders, key=_free_bytes)
    if place.name.startswith(TEMPORARY_PREFIX):  # a name that nobody else has ever seen
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
    """Within it a disk that is full, read-only or forbidden is one line instead of a traceback.

    Args:
        root: URL of the folder that is written to, beside the temporary folder.

    Raises:
        DiskUnusable: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        explained = unusable(error, root)
        if explained is None:
            raise
        raise explained from error
