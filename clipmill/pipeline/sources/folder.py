"""A folder or bucket prefix of video files.

Only regular files (or bucket objects) are listed, so a FIFO or a folder named ``x.mp4`` can block neither the listing
nor a decoder. Hidden files and folders (``.name``), which file managers and notebooks leave behind, are skipped.
``x.txt`` and ``x.json`` next to ``x.mp4`` are its sidecars: the listing records them, and the worker reads them. Other
files are counted by extension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.pipeline.sources.record import SourceVideo
from clipmill.video.kinds import HEAD_BYTES, SNIFFED_SUFFIXES, VIDEO_SUFFIXES, is_video_head, stem_of, suffix_of

__all__ = ["list_videos", "walk_files"]

_REQUESTS_AT_ONCE = 64
_ENTRIES_AT_ONCE = 1024

File = tuple[PurePosixPath, storage.Entry]


def walk_files(url: str, suffixes: frozenset[str], others: Counter[str]) -> Iterator[File]:
    """Yields the visible files below a folder with one of these extensions, in any case, sorted within each folder.

    Args:
        url: URL of the folder.
        suffixes: extensions in lower case.
        others: counts the other visible files by extension.
    """
    for path, entry in _visible_files(url):
        if path.suffix.lower() in suffixes:
            yield path, entry
        else:
            others[suffix_of(path.name)] += 1


def _classified(url: str, after: str | None) -> Iterator[tuple[File, bool]]:
    """Yields the visible files below a folder after ``after``, each with whether it is a video.

    In a bucket, a file that needs a check of its first bytes costs a request; many run at once.
    """
    files = _visible_files(url, after)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        while batch := list(islice(files, _ENTRIES_AT_ONCE)):
            known = [_is_video_by_name(*file) for file in batch]
            unknown = [file for file, is_video in zip(batch, known, strict=True) if is_video is None]
            apply = map if storage.is_local(url) else pool.map  # a disk is faster than waking a thread
            looked_at = iter(apply(lambda file: _is_video(url, file[1]), unknown))
            for file, is_video in zip(batch, known, strict=True):
                yield file, next(looked_at) if is_video is None else is_video


def _visible_files(url: str, after: str | None = None) -> Iterator[File]:
    for entry in storage.walk(url, after):
        path = PurePosixPath(entry.name)
        if not any(part.startswith(".") for part in path.parts):
            yield path, entry


def _is_video_by_name(path: PurePosixPath, entry: storage.Entry) -> bool | None:
    """Whether a file is a video by its name; None if its first bytes must decide."""
    suffix = suffix_of(path.name)
    if suffix in VIDEO_SUFFIXES or suffix not in SNIFFED_SUFFIXES or not entry.bytes:
        return suffix in VIDEO_SUFFIXES
    return None


def _is_video(url: str, entry: storage.Entry) -> bool:
    try:
        return is_video_head(storage.read_start(storage.resolve(url, entry.name), HEAD_BYTES))
    except (FileNotFoundError, PermissionError, storage.Unreadable, storage.Refused):
        return False  # unreadable, and its name is not that of a video


def list_videos(source: SourceConfig, others: Counter[str], after: str | None = None) -> Iterator[SourceVideo]:
    """Yields the videos of a folder, with the facts that their paths give.

    Args:
        source: the source to list.
        others: counts the files that are neither videos nor sidecars, by extension.
        after: a mark: the name after which the listing continues; None lists all.
    """
    described = frozenset(f".{kind}" for kind in source.sidecars)
    files = _classified(storage.absolute(source.url), after)
    for (path, entry), sidecars, mark in _with_sidecars(files, described, others):
        folder = str(path.parent)
        yield SourceVideo(
            name=entry.name,
            bytes=entry.bytes,
            etag=entry.etag,
            label=path.parent.name or None if source.label == "parent_folder" else None,
            actions=stem_of(entry.name) + source.actions_suffix if source.actions_suffix else None,
            sidecars=" ".join(sidecars) or None,
            group=f"folder:{folder}" if source.group == "parent_folder" and folder != "." else None,
            mark=mark,
        )


@dataclass
class _StemGroup:
    """The files that share a stem."""

    videos: list[File] = field(default_factory=list)
    sidecars: list[str] = field(default_factory=list)


def _with_sidecars(
    files: Iterable[tuple[File, bool]], suffixes: frozenset[str], others: Counter[str]
) -> Iterator[tuple[File, list[str], str | None]]:
    """Yields the videos, each with the extensions of its sidecars, and the mark after which a listing can continue.

    Names that begin with the same stem and a dot are neighbours in the listing, so few files have to wait for others.
    If none waits, all files up to the last name have been yielded or counted, and that name is a mark.

    Args:
        files: files in the order of a listing, each with whether it is a video.
        suffixes: extensions of sidecars, in lower case.
        others: counts files that are neither a video nor its sidecar, by extension.
    """
    groups: dict[str, _StemGroup] = {}
    last_name = None
    for (path, entry), is_video in files:
        suffix = suffix_of(path.name)
        if not is_video and suffix not in suffixes:
            others[suffix] += 1
            last_name = entry.name
            continue
        for stem in [stem for stem in groups if not f"{entry.name}.".startswith(f"{stem}.")]:
            group = groups.pop(stem)
            yield from _close(group, others, None if groups else last_name)
        last_name = entry.name
        group = groups.setdefault(stem_of(entry.name), _StemGroup())
        if is_video:
            group.videos.append((path, entry))
        else:
            group.sidecars.append(entry.name[-len(suffix) :])
    for group in groups.values():
        yield from _close(group, others, None)


def _close(group: _StemGroup, others: Counter[str], mark: str | None) -> Iterator[tuple[File, list[str], str | None]]:
    for number, video in enumerate(group.videos, start=1):
        yield video, group.sidecars, mark if number == len(group.videos) else None
    if not group.videos:
        others.update(suffix_of(f"x{suffix}") for suffix in group.sidecars)
