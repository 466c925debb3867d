"""A folder or bucket prefix of video files.

Only regular files (or bucket objects) are listed, so a FIFO or a folder named ``x.mp4`` can neither block the listing
nor a decoder. Names that begin with a dot are skipped, as are all files in folders that do: they are droppings of file
managers and notebooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.pipeline.sources.record import SourceVideo

__all__ = ["VIDEO_SUFFIXES", "list_videos", "walk_files"]

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".gif", ".wmv", ".ogv", ".3gp")
)
"""File name endings (any case) that make a file a video."""


def walk_files(url: str, suffixes: frozenset[str]) -> Iterator[tuple[PurePosixPath, storage.Entry]]:
    """The visible files below a folder whose names end so (any case), sorted within each folder."""
    for entry in storage.walk(url):
        path = PurePosixPath(entry.name)
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in path.parts):
            yield path, entry


def list_videos(source: SourceConfig) -> Iterator[SourceVideo]:
    """The videos of a folder; ``data.source.label`` says whether the folder of a file names its class."""
    for path, entry in walk_files(storage.absolute(source.url), VIDEO_SUFFIXES):
        yield SourceVideo(
            name=entry.name,
            bytes=entry.bytes,
            etag=entry.etag,
            label=path.parent.name or None if source.label == "parent_folder" else None,
            actions=str(path.with_suffix("")) + source.actions_suffix if source.actions_suffix else None,
        )
