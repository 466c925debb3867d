"""Verified access to the shards of a manifest: only files with the recorded hash are read.

A local shard is hashed in place. A shard of a bucket is downloaded whole into the cache folder, hashed and renamed.
Then it is mapped into memory.

All processes of a node share the cache folder without a daemon. It holds a note for each shard, which states the file
(size, modification time, inode) that was verified, so that other processes and later epochs and runs need not hash it
again. The note is locked while a process downloads or hashes; ``flock`` is released by the kernel however the process
ends.

A local file is compared with its note on every access, even if it is mapped already: others may write to it, and
reading the map of a truncated file would crash. The note cannot detect a change that keeps size, time and inode, such
as that of a failing disk; ``clipmill verify`` reads every byte.

A process holds a shared lock on a download while its memory map lives, and eviction removes only files that it can lock
exclusively. So no file is removed while it is read, and no lock outlives its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from clipmill import storage
from clipmill.errors import StageFailed, StorageUnavailable, UserError
from clipmill.scratch import private_folder
from clipmill.shards.commits import ShardEntry
from clipmill.shards.format import INDEX_SUFFIX, read_index
from clipmill.shards.manifest import Manifest

__all__ = ["OpenShard", "ShardCache", "needed_cache_bytes"]

MAX_OPEN_SHARDS = 256
"""Each open shard holds a file descriptor; a process may usually have 1,024."""
NUM_PREFETCHERS = 4
"""Parallel background downloads of one process, because one stream from a bucket does not fill a network link."""

logger = logging.getLogger(__name__)


def needed_cache_bytes(manifest: Manifest, num_streams: int, window: int) -> int:
    """Bytes of cache that one node needs so that no shard is downloaded twice in an epoch.

    streams x (window / samples per shard + 2) x shard bytes: a window spans that number of whole shards, and each
    of its ends cuts one more. The result is at most the size of the data set.

    Args:
        manifest: the data set.
        num_streams: streams that the ranks of this node read.
        window: length in samples of the windows that are shuffled within a stream.
    """
    filled = [shard for shard in manifest.shards if shard.samples]
    if not filled:
        return 0
    largest = max(shard.bytes for shard in filled)
    samples_per_shard = manifest.num_samples / len(filled)
    needed = num_streams * (window / samples_per_shard + 2) * largest
    return min(int(needed), sum(shard.bytes for shard in filled))


class _FileState(NamedTuple):
    """Facts about a file that change when it is replaced or modified."""

    bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> _FileState:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True)
class OpenShard:
    """A shard in memory. The map lives as long as views of it: evicting or unlinking the file does not cut it."""

    view: memoryview
    """uint8, the whole archive, read-only."""
    offsets: np.ndarray
    """uint64 [samples + 1]."""
    path: str
    """Path of the file."""
    state: _FileState
    """State of the file when its hash was verified."""


class ShardCache:
    """Opens the shards of a manifest, and keeps the most recently used ones open.

    Args:
        manifest: names, sizes and hashes.
        cache_dir: folder for downloads and notes. None uses this user's folder on the node's own disk; TMPDIR moves it.
        cache_bytes: limit for the downloads. The shard downloaded last always stays, even if it alone is larger.

    Raises:
        UserError: another user created the default folder, or can write to it.
    """

    def __init__(self, manifest: Manifest, cache_dir: Path | None, cache_bytes: int) -> None:
        self._manifest = manifest
        self._is_remote = not storage.is_local(manifest.url)
        self._cache_dir = cache_dir or private_folder()
        self._cache_bytes = cache_bytes
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._used_ns: dict[int, int] = {}
        self._asked_for: set[int] = set()
        self._prefetchers: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:  # neither memory maps nor threads can travel to a worker
        return {**self.__dict__, "_open": OrderedDict(), "_used_ns": {}, "_asked_for": set(), "_prefetchers": None}

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded."""
        return self._is_remote

    def prefetch(self, shards: Iterable[int]) -> None:
        """Downloads shards in the background. Errors are ignored here: `open` meets them again and reports them."""
        if not self._is_remote:
            return
        if self._prefetchers is None:
            self._prefetchers = ThreadPoolExecutor(NUM_PREFETCHERS, thread_name_prefix="shard-prefetch")
        for shard in shards:
            if shard not in self._open and shard not in self._asked_for:
                self._asked_for.add(shard)
                self._prefetchers.submit(self._prefetch, shard)

    def _prefetch(self, shard: int) -> None:
        entry = self._manifest.shards[shard]
        try:
            self._open_remote(storage.join(self._manifest.url, entry.name), entry)
        except Exception as error:
            logger.debug("cannot prefetch %s: %s", entry.name, error)

    def open(self, shard: int) -> OpenShard:
        """Opens a shard by its number in the manifest.

        Raises:
            UserError: the shard is missing, differs from the manifest, or does not fit on the disk.
            StageFailed: the bucket did not answer within the retry time.
        """
        if shard in self._open and self._is_unchanged(shard):
            self._used_ns[shard] = time.time_ns()
            self._open.move_to_end(shard)
            return self._open[shard]
        self._used_ns[shard] = time.time_ns()
        self._open[shard] = opened = self._open_verified(self._manifest.shards[shard])
        self._asked_for.discard(shard)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._close(next(iter(self._open)))
        if self._is_remote:
            self._evict(keep=shard)
        return opened

    def _is_unchanged(self, shard: int) -> bool:
        """Whether the mapped file is unchanged. Downloads are not checked: only this cache writes to them."""
        if self._is_remote:
            return True
        opened = self._open[shard]
        try:
            return _FileState.of(os.stat(opened.path)) == opened.state
        except FileNotFoundError:
            return False

    def _close(self, shard: int) -> None:
        """Drops a map. Map and lock end once no sample refers to it any more."""
        del self._open[shard], self._used_ns[shard]

    def _open_verified(self, entry: ShardEntry) -> OpenShard:
        url = storage.join(self._manifest.url, entry.name)
        try:
            if storage.is_local(url):
                return self._open_local(storage.local_path(url), entry)
            return self._open_remote(url, entry)
        except FileNotFoundError as error:
            raise self._damaged(entry, f"{error.filename or error} does not exist") from error
        except _Damage as damage:
            raise self._damaged(entry, str(damage)) from damage

    def _damaged(self, entry: ShardEntry, cause: str) -> UserError:
        return UserError(
            f"shard {entry.name} of {self._manifest.url}: {cause}; restore it from a copy, "
            f"and look for more with `clipmill verify {self._manifest.url}`"
        )

    def _open_local(self, path: Path, entry: ShardEntry) -> OpenShard:
        with path.open("rb") as file, self._note(path, entry) as note:
            state = _check_file(file, entry, note)
            return _map(file, path.with_name(entry.name + INDEX_SUFFIX).read_bytes(), entry, state)

    # ------------------------------------------------------------------------------------- downloads

    @property
    def _downloads(self) -> Path:
        return self._cache_dir / "shards"

    def _open_remote(self, url: str, entry: ShardEntry) -> OpenShard:
        self._downloads.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._downloads / f"{entry.sha256}.tar"
        index_path = path.with_name(path.name + INDEX_SUFFIX)
        with self._note(path, entry) as note:
            with contextlib.suppress(FileNotFoundError, _Damage), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                state = _check_file(file, entry, note)
                opened = _map(file, index_path.read_bytes(), entry, state)
                os.utime(path, ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))  # "used" must outlive noatime
                return opened
            unfinished = path.with_suffix(".part")  # locked: a killed download's rest may be overwritten
            self._download(url + INDEX_SUFFIX, index_path, entry)
            self._download(url, unfinished, entry)
            with unfinished.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                state = _check_file(file, entry, note)
                opened = _map(file, index_path.read_bytes(), entry, state)
                os.rename(unfinished, path)
        return opened

    def _download(self, url: str, path: Path, entry: ShardEntry) -> None:
        try:
            storage.fetch(url, path)
        except StorageUnavailable as error:
            raise StageFailed(f"shard {entry.name} of {self._manifest.url}: {error}") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            path.unlink(missing_ok=True)
            raise UserError(
                f"shard {entry.name} of {self._manifest.url}: no space left in {path.parent} for its "
                f"{entry.bytes:,} bytes; free some, lower cache_bytes, or move the cache with TMPDIR"
            ) from error

    def _evict(self, keep: int) -> None:
        """Removes the least recently used downloads that no process reads, until the rest fits the limit."""
        ours = {self._manifest.shards[shard].sha256: shard for shard in self._open}
        found = []
        for path in self._downloads.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                stat = path.stat()
                ours_ns = self._used_ns[ours[path.stem]] if path.stem in ours else 0
                found.append((max(ours_ns, stat.st_atime_ns), path, stat.st_size))
        num_bytes = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if num_bytes <= self._cache_bytes:
                return
            shard = ours.get(path.stem)
            if shard == keep:
                continue
            if shard is not None:
                self._close(shard)
            if _remove_unread(path):
                logger.debug("evicted %s", path)
                num_bytes -= size

    # ----------------------------------------------------------------------------------------- notes

    @contextlib.contextmanager
    def _note(self, path: Path, entry: ShardEntry) -> Iterator[BinaryIO | None]:
        """The locked note on a file; None if the cache folder is not writable, so that nothing can be remembered."""
        folder = self._cache_dir / "verified"
        name = hashlib.sha256(f"{os.path.abspath(path)}\n{entry.sha256}".encode()).hexdigest()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            note = os.fdopen(os.open(folder / name[:32], os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")
        except OSError as error:
            logger.debug("cannot remember verified shards in %s: %s", folder, error)
            yield None
            return
        with note:
            fcntl.flock(note, fcntl.LOCK_EX)
            yield note


def _remove_unread(path: Path) -> bool:
    """Removes a download and its index unless a process has it mapped. Returns whether it was removed."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        path.with_name(path.name + INDEX_SUFFIX).unlink(missing_ok=True)
        return True
    return False


class _Damage(Exception):
    """A file differs from the manifest; the message gives the reason."""


def _check_file(file: io.BufferedReader, entry: ShardEntry, note: BinaryIO | None) -> _FileState:
    """Raises `_Damage` unless the file has the entry's size and hash. A matching note replaces the hashing."""
    state = _FileState.of(os.fstat(file.fileno()))
    if state.bytes != entry.bytes:
        raise _Damage(f"{file.name} has {state.bytes} bytes, the manifest says {entry.bytes}")
    noted = " ".join(map(str, state)).encode()
    if note is not None and note.read() == noted:
        return state
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != entry.sha256:
        raise _Damage(f"{file.name} has sha256 {sha256}, the manifest says {entry.sha256}")
    if note is not None:
        note.seek(0)
        note.write(noted)
        note.truncate()
        note.flush()
    return state


def _map(file: io.BufferedReader, index: bytes, entry: ShardEntry, state: _FileState) -> OpenShard:
    if hashlib.sha256(index).hexdigest() != entry.index_sha256:
        raise _Damage(f"its {INDEX_SUFFIX} does not have the sha256 of the manifest")
    offsets = read_index(index)
    return OpenShard(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), offsets, file.name, state)
