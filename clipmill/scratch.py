"""Temporary folders: private to this user, and removed when the process that made them ends, even if it is killed.

A killed process cannot clean up, and one killed worker of the stage ``shard`` leaves gigabytes. Each folder therefore
has a lock (``flock``) that the kernel releases however its process ends. When a process makes its first folder, it
removes the folders that nobody locks. The age of a folder plays no role.

If several hosts share the temporary folder over a network, locks may be visible on one host only. The name of a folder
therefore contains hashes of boot id and host name, and a process only removes folders of its own machine. One matching
hash is enough: the host name stays the same after a reboot, and containers of one host share its boot id.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

from clipmill.errors import UserError

__all__ = ["ScratchFolder", "private_folder", "sweep"]

NAME = re.compile(r"clipmill-[a-z-]+-([0-9a-f]{8})-([0-9a-f]{8})-\w{8}")

logger = logging.getLogger(__name__)


class ScratchFolder:
    """A new folder, mode 0700, below the temporary folder (TMPDIR); removed by `close`, at the latest at exit.

    As a context manager it returns its path::

        with ScratchFolder("shard") as folder:
            (folder / "clips.tar").write_bytes(...)

    Args:
        purpose: a word for the folder's name, ``clipmill-<purpose>-...``.

    Raises:
        OSError: the temporary folder is full or missing.
    """

    def __init__(self, purpose: str) -> None:
        _sweep_once()
        self.path, lock = _create(f"clipmill-{purpose}-{'-'.join(_machine())}-")
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the folder and its content."""
        self._remove()


def private_folder() -> Path:
    """This user's folder for files that outlive a process, ``clipmill-<uid>`` below the temporary folder.

    Raises:
        UserError: another user made it, or can write to it.
    """
    path = Path(tempfile.gettempdir()) / f"clipmill-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = "is open to other users" if is_ours else "is not a folder of this user"
        raise UserError(f"{path} {what} and cannot be trusted; remove it, or set TMPDIR to a folder of your own")
    path.chmod(0o700)
    return path


def sweep() -> None:
    """Removes this user's folders of dead processes from the temporary folder; errors are ignored."""
    for entry in os.scandir(tempfile.gettempdir()):
        name = NAME.fullmatch(entry.name)
        if name is None or not any(ours == theirs for ours, theirs in zip(_machine(), name.groups(), strict=True)):
            continue
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            _remove(Path(entry.path), _lock(Path(entry.path)))
            logger.info("removed %s, which a dead process left behind", entry.path)


_sweep_once = functools.cache(sweep)


@functools.cache
def _machine() -> tuple[str, str]:
    """Hashes of this boot and of this host's name."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = host
    first, second = (hashlib.sha256(text.encode()).hexdigest()[:8] for text in (boot, host))
    return first, second


def _create(prefix: str) -> tuple[Path, int | None]:
    """A new folder and the file descriptor that locks it; None if the file system cannot lock folders."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            return path, _lock(path)
        except (FileNotFoundError, BlockingIOError):
            continue  # another process swept between the two steps and found the folder unlocked
        except OSError as error:
            # NFS cannot lock folders. A sweep fails there in the same way, and removes nothing.
            logger.debug("cannot lock %s: %s", path, error)
            return path, None


def _lock(path: Path) -> int:
    """Locks a folder; returns the file descriptor that holds the lock.

    Raises:
        FileNotFoundError: another process has removed the folder.
        BlockingIOError: another process holds the lock.
        OSError: the file system cannot lock folders.
    """
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(path)):
            raise FileNotFoundError(path)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove(path: Path, lock: int | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)
