"""A planned video and its actions, as files and arrays on this machine."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from clipmill import storage
from clipmill.config import DataConfig
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.sources import base_url, is_gone, read_array
from clipmill.pipeline.sources.record import DamagedVideo
from clipmill.video import write_raw_video

__all__ = ["ExcludedVideo", "LocalVideo", "fetch_video"]


class ExcludedVideo(Exception):
    """This video gives no clips; ``document`` says why, without anything that differs from run to run."""

    def __init__(self, stage: str, cause: str, attempts: Sequence[str] = (), stderr: str = "") -> None:
        super().__init__(cause)
        self.document = {"stage": stage, "cause": cause, "attempts": list(attempts), "stderr": stderr}


class LocalVideo(NamedTuple):
    """A video that a decoder can read.

    Attributes:
        path: its file: the source's own, or a copy in the folder that `fetch_video` was given.
        actions: float32 [num_frames, ...], or none.
    """

    path: Path
    actions: np.ndarray | None


def fetch_video(data: DataConfig, video: PlannedVideo, folder: Path) -> LocalVideo:
    """Brings a video to this machine.

    Raises:
        ExcludedVideo: it is missing, damaged or has changed since it was planned, or its actions are bad.
        OSError: the environment failed.
    """
    try:
        if video.member is not None:
            return _extract(data, video, folder / "video.nut")
        path = _local_copy(data, video.url, folder / f"video{PurePosixPath(video.url).suffix}")
    except FileNotFoundError as error:
        if is_gone(data.source):
            raise OSError(f"the source {storage.absolute(data.source.url)} is empty or gone") from error
        raise ExcludedVideo("fetch", f"{video.url} is missing") from error
    if path.stat().st_size != video.bytes:
        raise ExcludedVideo("fetch", f"changed since it was planned: {video.bytes} -> {path.stat().st_size} bytes")
    return LocalVideo(path, _read_actions(data, video, folder))


def _extract(data: DataConfig, video: PlannedVideo, path: Path) -> LocalVideo:
    """A video that its source stores as an array, as a file without compression: from here on it is like any other."""
    url = storage.resolve(base_url(data.source), video.url)
    assert video.member is not None
    try:
        array = read_array(data.source, url, video.member, video.bytes)
    except DamagedVideo as damaged:
        raise ExcludedVideo("fetch", str(damaged)) from damaged
    write_raw_video(path, array.frames, data.source.array_fps)
    return LocalVideo(path, array.actions)


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
    storage.fetch(url, copy)
    return copy


def _read_actions(data: DataConfig, video: PlannedVideo, folder: Path) -> np.ndarray | None:
    """float32 [num_frames, ...]: the actions of a video; none where no file of that name lies beside it in a folder."""
    if video.actions is None:
        return None
    try:
        path = _local_copy(data, video.actions, folder / "actions")
    except FileNotFoundError as error:
        if data.source.type == "folder":
            return None
        raise ExcludedVideo("actions", f"{video.actions} is missing") from error
    try:
        actions = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if actions.ndim < 1 or actions.dtype.kind not in "fiub":
            raise ValueError(f"an array {actions.dtype} {list(actions.shape)}")
    except (ValueError, EOFError) as error:
        raise ExcludedVideo("actions", f"{video.actions} is no numeric .npy file with a row for each frame") from error
    return np.asarray(actions, np.float32)
