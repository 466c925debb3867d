"""Fetches a planned video and its actions, as files and arrays on this machine."""

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
"""Limit of the actions as float32 in memory: four million frames of 64 numbers."""


class ExcludedVideo(Exception):
    """A video gives no clips. ``document`` states the reason, without anything that differs between runs."""

    def __init__(self, stage: str, cause: str, attempts: Sequence[str] = (), stderr: str = "") -> None:
        super().__init__(cause)
        self.document = {"stage": stage, "cause": cause, "attempts": list(attempts), "stderr": stderr}


class LocalVideo(NamedTuple):
    """A video that a decoder can read.

    Attributes:
        path: the source's own file, or a copy in the folder given to `fetch_video`.
        actions: float32 [num_rows, ...]; None without actions.
        action_seconds: float64 [num_rows], time of each row from the start of the video; None if row i belongs to frame
            i.
    """

    path: Path
    actions: np.ndarray | None
    action_seconds: np.ndarray | None = None


def fetch_video(data: DataConfig, video: PlannedVideo, folder: Path, kept: KeptFiles) -> LocalVideo:
    """Fetches a video to this machine.

    Args:
        data: config of the source.
        video: the planned video.
        folder: folder for files that only this video needs.
        kept: local copies that the next videos may need too.

    Raises:
        ExcludedVideo: the source cannot provide it; it is missing, damaged or has changed since it was planned; or its
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
        else:  # the next videos may be other spans of this file
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
    """Extracts one video from a file with several into its own file. Raw frames are written without compression."""
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
    """Limits of time and size for fetching one file from a web server."""
    return storage.Limits(data.fetch_seconds, data.fetch_bytes)


def _limits(data: DataConfig) -> Limits:
    """Limits for reading an array. A read may wait for storage, so the CPU limit, not the time, detects an endless
    loop.
    """
    return Limits(data.cpu_seconds_per_video, data.memory_bytes_per_video, data.fetch_seconds)


def _local_copy(data: DataConfig, name: str, copy: Path) -> Path:
    """Local path of a file of the source: the file itself if the source is local, else a copy at ``copy``.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    url = storage.resolve(base_url(data.source), name)
    if storage.is_local(url):
        path = storage.local_path(url)
        path.stat()
        try:
            str(path).encode()
        except UnicodeEncodeError:  # decoders accept only UTF-8 names
            copy.symlink_to(path)
            return copy
        return path
    storage.fetch(url, copy, fetch_limits(data))
    return copy


def _read_actions(data: DataConfig, name: str, folder: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Actions and times of a `LocalVideo`; (None, None) if the folder has no action file for the video."""
    try:
        rows = read_rows(data.source, name)
        if rows is not None:
            return rows
        path = _local_copy(data, name, folder / "actions")
    except FileNotFoundError as error:
        if data.source.type == "folder":
            return None, None
        raise ExcludedVideo("actions", f"{storage.shown(name)} is missing") from error
    except (storage.Unreadable, storage.Refused, DamagedVideo) as error:  # the video itself is readable
        raise ExcludedVideo("actions", str(error)) from error
    try:
        actions = open_array(path)
    except DamagedVideo as damaged:
        raise ExcludedVideo("actions", f"{storage.shown(name)}: {damaged}") from damaged
    if actions.ndim < 1 or actions.dtype.kind not in "fiub" or actions.size * 4 > _MOST_ACTION_BYTES:
        found = f"{actions.dtype} {list(actions.shape)}"
        raise ExcludedVideo("actions", f"{storage.shown(name)} is {found}; actions must be numbers, one row per frame")
    return np.asarray(actions, np.float32), None
