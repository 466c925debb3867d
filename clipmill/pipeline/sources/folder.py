"""A folder or bucket prefix of video files.

Only regular files (or bucket objects) are listed, so a FIFO or a folder named ``x.mp4`` can neither block the listing
nor a decoder. Names that begin with a dot are skipped, as are all files in folders that do: they are droppings of file
managers and notebooks. What else lies there and is no video is counted by the ending of its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.pipeline.sources.record import SourceVideo
from clipmill.video.kinds import HEAD_BYTES, SNIFFED_SUFFIXES, VIDEO_SUFFIXES, is_video_head, suffix_of

__all__ = ["list_videos", "walk_files", "walk_videos"]

_REQUESTS_AT_ONCE = 64
_ENTRIES_AT_ONCE = 1024

File = tuple[PurePosixPath, storage.Entry]


def walk_files(url: str, suffixes: frozenset[str], others: Counter[str]) -> Iterator[File]:
    """The visible files below a folder with one of these endings (any case), sorted within each folder.

    Args:
        url: of the folder.
        suffixes: in lower case.
        others: counts the other visible files by ending.
    """
    for path, entry in _visible_files(url):
        if path.suffix.lower() in suffixes:
            yield path, entry
        else:
            others[suffix_of(path.name)] += 1


def walk_videos(url: str, others: Counter[str]) -> Iterator[File]:
    """The visible videos below a folder, by ending or by first bytes, sorted within each folder.

    In a bucket, each file that only its first bytes tell costs a request; many are made at once.

    Args:
        url: of the folder.
        others: counts the other visible files by ending.
    """
    files = _visible_files(url)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        apply = map if storage.is_local(url) else pool.map  # a disk answers sooner than a thread is woken
        while batch := list(islice(files, _ENTRIES_AT_ONCE)):
            for (path, entry), is_video in zip(batch, apply(lambda file: _is_video(url, *file), batch), strict=True):
                if is_video:
                    yield path, entry
                else:
                    others[suffix_of(path.name)] += 1


def _visible_files(url: str) -> Iterator[File]:
    for entry in storage.walk(url):
        path = PurePosixPath(entry.name)
        if not any(part.startswith(".") for part in path.parts):
            yield path, entry


def _is_video(url: str, path: PurePosixPath, entry: storage.Entry) -> bool:
    suffix = suffix_of(path.name)
    if suffix in VIDEO_SUFFIXES or suffix not in SNIFFED_SUFFIXES or not entry.bytes:
        return suffix in VIDEO_SUFFIXES
    try:
        return is_video_head(storage.read_start(storage.join(url, entry.name), HEAD_BYTES))
    except (FileNotFoundError, PermissionError):  # whatever it is, nothing calls it a video
        return False


def list_videos(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    """The videos of a folder; ``data.source.label`` says whether the folder of a file names its class.

    ``others`` counts the other files by ending.
    """
    for path, entry in walk_videos(storage.absolute(source.url), others):
        yield SourceVideo(
            name=entry.name,
            bytes=entry.bytes,
            etag=entry.etag,
            label=path.parent.name or None if source.label == "parent_folder" else None,
            actions=str(path.with_suffix("")) + source.actions_suffix if source.actions_suffix else None,
        )
