"""A folder or bucket prefix of video files.

Only regular files (or bucket objects) are listed, so a FIFO or a folder named ``x.mp4`` can neither block the listing
nor a decoder. Names that begin with a dot are skipped, as are all files in folders that do: they are droppings of file
managers and notebooks. ``x.txt`` and ``x.json`` beside ``x.mp4`` are its sidecars: the listing notes that they are
there, the worker reads them. What else lies there and is no video is counted by the ending of its name.
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


def _classified(url: str, after: str | None) -> Iterator[tuple[File, bool]]:
    """The visible files below a folder, behind ``after``, and whether each is a video.

    In a bucket, each file that only its first bytes tell costs a request; many are made at once.
    """
    files = _visible_files(url, after)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        while batch := list(islice(files, _ENTRIES_AT_ONCE)):
            known = [_is_video_by_name(*file) for file in batch]
            unknown = [file for file, is_video in zip(batch, known, strict=True) if is_video is None]
            apply = map if storage.is_local(url) else pool.map  # a disk answers sooner than a thread is woken
            looked_at = iter(apply(lambda file: _is_video(url, file[1]), unknown))
            for file, is_video in zip(batch, known, strict=True):
                yield file, next(looked_at) if is_video is None else is_video


def _visible_files(url: str, after: str | None = None) -> Iterator[File]:
    for entry in storage.walk(url, after):
        path = PurePosixPath(entry.name)
        if not any(part.startswith(".") for part in path.parts):
            yield path, entry


def _is_video_by_name(path: PurePosixPath, entry: storage.Entry) -> bool | None:
    """Whether a file is a video; None: its first bytes tell."""
    suffix = suffix_of(path.name)
    if suffix in VIDEO_SUFFIXES or suffix not in SNIFFED_SUFFIXES or not entry.bytes:
        return suffix in VIDEO_SUFFIXES
    return None


def _is_video(url: str, entry: storage.Entry) -> bool:
    try:
        return is_video_head(storage.read_start(storage.resolve(url, entry.name), HEAD_BYTES))
    except (FileNotFoundError, PermissionError, storage.Unreadable, storage.Refused):
        return False  # whatever it is, nothing calls it a video


def list_videos(source: SourceConfig, others: Counter[str], after: str | None = None) -> Iterator[SourceVideo]:
    """The videos of a folder, with what its names say about them.

    Args:
        source: to list.
        others: counts the files that are neither videos nor describe one, by ending.
        after: a mark: the name behind which the listing goes on.
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
    """The videos, each with the endings of its sidecars, and the name behind which a listing can go on.

    Names that begin with the same stem and a dot follow each other in the listing, so few files wait for others. Where
    none does, all files up to the last name have been given or counted: that name is a mark.

    Args:
        files: in the order of a listing, and whether each is a video.
        suffixes: of sidecars, in lower case.
        others: counts what is neither a video nor a sidecar of one, by ending.
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
