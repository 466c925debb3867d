"""Where raw videos come from: one streaming listing a source type, no video opened.

A source yields `SourceVideo` records in a stable order. Only regular files (or bucket objects) are listed,
so a FIFO or a folder named ``x.mp4`` can neither block the listing nor a decoder. Names that begin with a
dot are skipped, as are all files in folders that do: they are droppings of file managers and notebooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError

__all__ = ["VIDEO_SUFFIXES", "SourceVideo", "check_source", "list_videos"]

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".gif", ".wmv", ".ogv", ".3gp")
)
"""File name endings (any case) that make a file a video."""


@dataclass(frozen=True)
class SourceVideo:
    """One listed video.

    Attributes:
        name: path relative to the source, with ``/``.
        bytes: size of the file.
        etag: the bucket's content tag; none on a local disk.
        label: name of its class, or none.
        actions: relative path of the file with its actions, or none.
        text: its caption; always none so far, since a folder of files holds no captions (the plan and the clips'
            json keep the place for sources that do).
    """

    name: str
    bytes: int
    etag: str | None
    label: str | None
    actions: str | None
    text: str | None


def list_videos(source: SourceConfig) -> Iterator[SourceVideo]:
    """Lists the videos of a source, recursively, sorted within each folder.

    Raises:
        UserError: the source does not exist, may not be read, or holds no video.
    """
    url = _existing_source(source)
    num_videos = 0
    try:
        for entry in storage.walk(url):
            path = PurePosixPath(entry.name)
            if path.suffix.lower() in VIDEO_SUFFIXES and not any(part.startswith(".") for part in path.parts):
                num_videos += 1
                yield _source_video(source, path, entry)
    except PermissionError as error:
        raise UserError(f"data.source.url {url} cannot be listed ({error}); check its permissions") from error
    if not num_videos:
        endings = ", ".join(sorted(suffix.removeprefix(".") for suffix in VIDEO_SUFFIXES))
        raise UserError(f"data.source.url {url} holds no video (files ending in {endings}); name another folder")


def check_source(source: SourceConfig) -> None:
    """Raises the `UserError` of `list_videos` as far as a look at the first entries of a local folder finds it."""
    if storage.is_local(_existing_source(source)):
        next(list_videos(source))


def _existing_source(source: SourceConfig) -> str:
    if not source.url:
        raise UserError("data.source.url is empty; set it to the folder or bucket prefix that holds the videos")
    url = storage.absolute(source.url)
    if storage.is_local(url) and not storage.local_path(url).is_dir():
        problem = "is a file, not a folder" if storage.exists(url) else "does not exist"
        raise UserError(f"data.source.url {url} {problem}; name the folder that holds the videos")
    return url


def _source_video(source: SourceConfig, path: PurePosixPath, entry: storage.Entry) -> SourceVideo:
    return SourceVideo(
        name=entry.name,
        bytes=entry.bytes,
        etag=entry.etag,
        label=path.parent.name or None if source.label == "parent_folder" else None,
        actions=str(path.with_suffix("")) + source.actions_suffix if source.actions_suffix else None,
        text=None,
    )
