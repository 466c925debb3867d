"""A planned video and its actions, as files and arrays on this machine."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipmill import storage
from clipmill.config import DataConfig
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.sources import base_url, extract, is_gone, is_refused_alone, read_array, read_rows
from clipmill.pipeline.sources.multivideo import KeptFiles
from clipmill.pipeline.sources.npy import open_array
from clipmill.pipeline.sources.record import DamagedVideo
from clipmill.video import Limits, write_raw_video
from clipmill.video.kinds import suffix_of

__all__ = ["ExcludedVideo", "LocalVideo", "fetch_limits", "fetch_video"]

_MOST_ACTION_BYTES = 2**30
"""As float32, in memory: four million frames of 64 numbers."""


class ExcludedVideo(Exception):
    """This video gives no clips; ``document`` says why, without anything that differs from run to run."""

    def __init__(self, stage: str, cause: str, attempts: Sequence[str] = (), stderr: str = "") -> None:
        super().__init__(cause)
        self.document = {"stage": stage, "cause": cause, "attempts": list(attempts), "stderr": stderr}


class LocalVideo(NamedTuple):
    """A video that a decoder can read.

    Attributes:
        path: its file: the source's own, or a copy in the folder that `fetch_video` was given.
        actions: float32 [num_rows, ...], or none.
        action_seconds: float64 [num_rows], the time of each row from the start of the video; None: row i belongs to
            frame i.
    """

    path: Path
    actions: np.ndarray | None
    action_seconds: np.ndarray | None = None


def fetch_video(data: DataConfig, video: PlannedVideo, folder: Path, kept: KeptFiles) -> LocalVideo:
    """Brings a video to this machine.

    Args:
        data: names the source.
        video: which video.
        folder: for files of this video alone.
        kept: local copies that the next videos may need too.

    Raises:
        ExcludedVideo: its source cannot give it, it is missing, damaged or has changed since it was planned, or its
            actions are bad.
        OSError, DecoderLost: the environment failed.
        UserError: storage refuses this video, and others too.
    """
    if video.fault is not None:
        raise ExcludedVideo("list", video.fault)
    try:
        if video.member is not None:
            return _extract(data, video, folder, kept)
        name = f"video{suffix_of(storage.split(video.url)[1])}"
        if video.span == (None, None):
            path = _local_copy(data, video.url, folder / name)
        else:  # the next videos are other spans of this file
            path = kept.get(video.url, name, partial(_local_copy, data, video.url))
    except FileNotFoundError as error:
        if is_gone(data.source):
            gone = f"the source {storage.absolute(data.source.url)} is empty or gone"
            raise OSError(errno.ENODEV, gone) from error
        raise ExcludedVideo("fetch", f"{storage.shown(video.url)} is missing") from error
    except storage.Unreadable as error:
        raise ExcludedVideo("fetch", str(error)) from error
    except storage.Refused as error:
        if not is_refused_alone(data.source, storage.resolve(base_url(data.source), video.url)):
            raise
        raise ExcludedVideo("fetch", str(error)) from error
    if path.stat().st_size != video.bytes:
        raise ExcludedVideo("fetch", f"changed since it was planned: {video.bytes} -> {path.stat().st_size} bytes")
    if video.actions is None:
        return LocalVideo(path, None)
    return LocalVideo(path, *_read_actions(data, video.actions, folder))


def _extract(data: DataConfig, video: PlannedVideo, folder: Path, kept: KeptFiles) -> LocalVideo:
    """A video of a file of several as a file of its own; one without a codec is written without compression."""
    url = storage.resolve(base_url(data.source), video.url)
    assert video.member is not None
    try:
        path = extract(data.source, url, video.member, video.bytes, folder)
        if path is not None:
            return LocalVideo(path, None)
        array = read_array(data.source, url, video.member, video.bytes, kept, _limits(data))
    except DamagedVideo as damaged:
        raise ExcludedVideo("fetch", str(damaged)) from damaged
    path = folder / "video.nut"
    write_raw_video(path, array.frames, data.source.array_fps)
    return LocalVideo(path, array.actions)


def fetch_limits(data: DataConfig) -> storage.Limits:
    """What a web server may take and send for one file."""
    return storage.Limits(data.fetch_seconds, data.fetch_bytes)


def _limits(data: DataConfig) -> Limits:
    """A read may have to wait for storage: the processor time tells a loop from a wait."""
    return Limits(data.cpu_seconds_per_video, data.memory_bytes_per_video, data.fetch_seconds)


def _local_copy(data: DataConfig, name: str, copy: Path) -> Path:
    """A file of the source on this machine: itself where the source is local, else fetched to ``copy``.

    Raises:
        FileNotFoundError: there is none.
    """
    url = storage.resolve(base_url(data.source), name)
    if storage.is_local(url):
        path = storage.local_path(url)
        path.stat()
        try:
            str(path).encode()
        except UnicodeEncodeError:  # decoders take names in UTF-8 only
            copy.symlink_to(path)
            return copy
        return path
    storage.fetch(url, copy, fetch_limits(data))
    return copy


def _read_actions(data: DataConfig, name: str, folder: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The actions of a `LocalVideo` and their times; none where no file of that name lies beside a folder's video."""
    try:
        rows = read_rows(data.source, name)
        if rows is not None:
            return rows
        path = _local_copy(data, name, folder / "actions")
    except FileNotFoundError as error:
        if data.source.type == "folder":
            return None, None
        raise ExcludedVideo("actions", f"{storage.shown(name)} is missing") from error
    except (storage.Unreadable, storage.Refused, DamagedVideo) as error:  # the video itself was not refused
        raise ExcludedVideo("actions", str(error)) from error
    try:
        actions = open_array(path)
    except DamagedVideo as damaged:
        raise ExcludedVideo("actions", f"{storage.shown(name)}: {damaged}") from damaged
    if actions.ndim < 1 or actions.dtype.kind not in "fiub" or actions.size * 4 > _MOST_ACTION_BYTES:
        found = f"{actions.dtype} {list(actions.shape)}"
        raise ExcludedVideo("actions", f"{storage.shown(name)} is {found}; actions are numbers, a row for each frame")
    return np.asarray(actions, np.float32), None
