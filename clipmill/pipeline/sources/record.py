"""What a source says about one video, and what identifies a file without reading all of it."""

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
        bytes: size of the file; of its own part where the file holds several videos.
        etag: the bucket's content tag of the file; none on a local disk.
        label: name of its class, or none.
        actions: name of the file with its actions (``lerobot``: of many videos; the episode follows ``#``), or none.
        text: its caption, or none.
        split: the split that the source itself gives the video; None: a hash of its group decides.
        member: which video of the file it is, where a file holds several. Its source type reads it.
        metadata: JSON object of what else the source knows about it, or none.
        identity: what tells the file, or its member, from others; None: `file_identity` of its file. A span is added by
            the listing.
        start_seconds: where the video begins in its file, counted from the file's first frame; None: at that frame.
        end_seconds: where it ends; None: with the file.
        group: its origin. Videos of one group are always in the same split. None: its identity without the span, so
            that the spans of one file are a group.
        sidecars: endings of the files beside it that describe it (``.json .txt``), or none.
        fault: why the source cannot give this video, in one line; None where it can. The stage excludes the video with
            that cause.
        together: identity of a file that must be fetched whole for this video, though it holds others: they follow each
            other in the plan. None: the file, for a span; else any order is as good.
        mark: where a listing that ended behind this video can go on (`list_videos` groups it); None: not here.
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
        actions: float32 [num_frames, action_dim], or none.
    """

    frames: np.ndarray
    actions: np.ndarray | None


class TimedRows(NamedTuple):
    """Rows of actions that were recorded beside a video.

    Attributes:
        values: float32 [num_rows, action_dim].
        seconds: float64 [num_rows], from the start of the video.
    """

    values: np.ndarray
    seconds: np.ndarray


class DamagedVideo(Exception):
    """A video of a file of several cannot be read: the message says why, in one line."""


def file_identity(url: str, num_bytes: int, etag: str | None) -> str:
    """What storage says about a file's content without reading all of it.

    The form is ``kind:bytes:tag``, without further colons. Where there is no content tag, the first and last bytes
    stand for the content.

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
