"""The record of a listed video, and the identity of a file that is not read completely."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from clipmill import storage

__all__ = ["EDGE_BYTES", "ArrayVideo", "DamagedVideo", "SourceVideo", "TimedRows", "edges_sha256", "file_identity"]

EDGE_BYTES = 64 * 2**10


@dataclass(frozen=True)
class SourceVideo:
    """One listed video.

    Attributes:
        name: path of its file relative to `base_url` of the source, with ``/``, or an absolute path or URL.
        bytes: size of its file; if the file holds several videos, size of its own part.
        etag: the bucket's content tag of the file; None on a local disk.
        label: name of its class; None without a class.
        actions: name of the file with its actions; for ``lerobot`` a file of many videos, ``#`` and the episode. None
            without actions.
        text: its caption; None without a caption.
        split: the split that the source gives the video; None lets a hash of its group decide.
        member: selects the video in a file that holds several, in a form that its source type reads; None for a file
            with one video.
        metadata: JSON object with the source's other facts about it; None without any.
        identity: identifies the file, or its member, by content; None uses `file_identity` of its file. The listing
            adds the span.
        start_seconds: start in its file, in seconds from the file's first frame; None means the first frame.
        end_seconds: end in its file; None means the end of the file.
        group: its origin. Videos of one group are always in the same split. None uses its identity without the span, so
            that the spans of one file form a group.
        sidecars: extensions of the files that describe it (``.json .txt``); None without sidecars.
        fault: why the source cannot provide this video, in one line; the stage excludes the video with that cause. None
            if it can.
        together: identity of a file that must be fetched whole for this and other videos, which then follow each other
            in the plan. None uses the file for a span, and otherwise any order.
        mark: position after this video from which `list_videos` can continue; None if it cannot continue here.
    """

    name: str
    bytes: int
    etag: str | None
    label: str | None = None
    actions: str | None = None
    text: str | None = None
    split: Literal["train", "val"] | None = None
    member: str | None = None
    metadata: str | None = None
    identity: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    group: str | None = None
    sidecars: str | None = None
    fault: str | None = None
    together: str | None = None
    mark: str | None = None


@dataclass(frozen=True)
class ArrayVideo:
    """A video that is stored as an array, without a codec.

    Attributes:
        frames: uint8 [num_frames, H, W, 3], RGB.
        actions: float32 [num_frames, action_dim]; None without actions.
    """

    frames: np.ndarray
    actions: np.ndarray | None


class TimedRows(NamedTuple):
    """Rows of actions that were recorded with their own times.

    Attributes:
        values: float32 [num_rows, action_dim].
        seconds: float64 [num_rows], time of each row from the start of the video.
    """

    values: np.ndarray
    seconds: np.ndarray


class DamagedVideo(Exception):
    """A video in a file with several cannot be read; the message gives the reason in one line."""


def file_identity(url: str, num_bytes: int, etag: str | None) -> str:
    """Identifies a file's content without reading all of it.

    The form is ``kind:bytes:tag``, without further colons. Without a content tag, a hash of the first and last bytes is
    used.

    Raises:
        FileNotFoundError: the file has vanished.
        OSError, UserError: it cannot be read.
    """
    if not storage.is_local(url) and etag is not None:
        return f"bucket:{num_bytes}:{etag.replace(':', '-')}"  # a web server's tag may be a time
    return f"disk:{num_bytes}:{edges_sha256(url, num_bytes)}"


def edges_sha256(url: str, num_bytes: int) -> str:
    """Hash of the first and the last `EDGE_BYTES` of a file of ``num_bytes``.

    Raises:
        FileNotFoundError: the file has vanished.
        OSError, UserError: it cannot be read.
    """
    with storage.open_to_read(url, EDGE_BYTES) as file:
        digest = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(num_bytes - EDGE_BYTES, 0))
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()
