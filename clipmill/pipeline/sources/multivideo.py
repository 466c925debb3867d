"""Helpers for sources whose files hold many videos: find the files, list several at once, keep local copies of one."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

from clipmill import storage
from clipmill.errors import ClipmillError
from clipmill.pipeline.sources.folder import walk_files
from clipmill.pipeline.sources.record import SourceVideo

__all__ = ["KeptFiles", "find_files", "list_each"]

_FILES_AT_ONCE = 16

logger = logging.getLogger(__name__)


def find_files(url: str, suffixes: frozenset[str], others: Counter[str]) -> tuple[str, Iterator[storage.Entry]]:
    """The files with one of these extensions (any case) below a folder, or the single file that the URL names.

    Args:
        url: absolute URL.
        suffixes: extensions in lower case.
        others: counts the other files of a folder by extension.

    Returns:
        The folder that their names refer to, and the files.
    """
    folder, name = storage.split(url)
    if PurePosixPath(name).suffix.lower() in suffixes:
        return folder, iter([storage.stat(url)])
    return url, (entry for _, entry in walk_files(url, suffixes, others))


def list_each(
    base: str, files: Iterable[storage.Entry], list_one: Callable[[storage.Entry], Iterable[SourceVideo]]
) -> Iterator[SourceVideo]:
    """Yields the videos of each file, in the order of the files. In a bucket several files are read at once.

    An unreadable file is listed as one video with a fault.

    Raises:
        Refused: the storage denies access to all files.
    """
    refused, num_files = [], 0

    def list_or_fault(file: storage.Entry) -> Iterator[SourceVideo]:
        try:
            yield from list_one(file)
        except FileNotFoundError:
            logger.warning("%s vanished while the source was listed", storage.shown(file.name))
        except Exception as error:
            is_files = isinstance(error, storage.Refused | storage.Unreadable)
            if isinstance(error, ClipmillError | MemoryError) and not is_files:
                raise
            if isinstance(error, storage.Refused):
                refused.append(error)
            fault = str(error).partition("\n")[0] or type(error).__name__
            identity = f"fault:{file.name}:{file.bytes}:{file.etag}"
            yield SourceVideo(file.name, file.bytes, file.etag, member="0", identity=identity, fault=fault)

    files = iter(files)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        while batch := list(islice(files, 1 if storage.is_local(base) else _FILES_AT_ONCE)):
            num_files += len(batch)
            listings = (
                map(list_or_fault, batch) if len(batch) == 1 else pool.map(lambda f: list(list_or_fault(f)), batch)
            )
            for videos in listings:
                yield from videos
    if refused and len(refused) == num_files:
        raise refused[0]


class KeptFiles:
    """Local copies of one source file, or of parts of it, kept until another file is requested.

    Videos of one file are consecutive in a unit, so each file is fetched once and the disk holds one at a time. Another
    order would only take longer.
    """

    def __init__(self, folder: Path) -> None:
        """Keeps them in ``folder``, which is emptied for each new file."""
        self._folder = folder
        self._url: str | None = None
        self._paths: dict[str, Path] = {}

    def get(self, url: str, part: str, make: Callable[[Path], Path]) -> Path:
        """Returns the local copy of a part of a file.

        Args:
            url: URL of the file.
            part: name of the part; the copy gets its extension.
            make: called with a path if there is no copy yet; writes the copy and returns its path, or returns the path
                of a local original.
        """
        if url != self._url:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            self._url, self._paths = url, {}
        if part not in self._paths:
            self._paths[part] = make(self._folder / f"{len(self._paths)}{PurePosixPath(part).suffix}")
        return self._paths[part]
