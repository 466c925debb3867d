"""Videos in NumPy files: ``.npy`` and ``.npz``, with one or many videos per file.

Axes: N videos, T frames, H rows, W columns, C channels (1 or 3; without C the videos are grey). Values are integers
from 0 to 255 of any integer type. Listing reads headers only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources.multivideo import KeptFiles, find_files, list_each
from clipmill.pipeline.sources.npy import ArrayHeader, copy_member, open_array, read_header, read_npz_headers
from clipmill.pipeline.sources.record import ArrayVideo, DamagedVideo, SourceVideo, file_identity

__all__ = ["SUFFIXES", "list_videos", "read_array"]

SUFFIXES = frozenset((".npy", ".npz"))
_BLOCK_BYTES = 2**22
_CHANNELS = (1, 3)
_DEFAULT_ACTIONS = ("action",)


class _Layout(NamedTuple):
    """The layout of an array of videos.

    ``axes``: one letter per axis. ``key``: the array's name in an ``.npz`` file; empty for an ``.npy`` file.
    """

    key: str
    header: ArrayHeader
    axes: str

    @property
    def num_videos(self) -> int:
        return self.header.shape[self.axes.index("N")] if "N" in self.axes else 1

    @property
    def video_shape(self) -> tuple[int, ...]:
        return tuple(size for axis, size in zip(self.axes, self.header.shape, strict=True) if axis != "N")

    @property
    def video_bytes(self) -> int:
        return math.prod(self.video_shape) * self.header.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether each video is a contiguous range of bytes in its file."""
        return not self.key and not self.header.is_fortran and "N" not in self.axes[1:]


def list_videos(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    """Yields the videos of all files. An unreadable file is listed as one video with a fault.

    ``others`` counts the other files by extension.

    Raises:
        UserError: none of the files can be read; the message gives the reason for the first.
    """
    url = storage.absolute(source.url)
    base, files = find_files(url, SUFFIXES, others)
    first_fault, is_any_good = None, False
    for video in list_each(base, files, partial(_list_file, source, base)):
        is_any_good |= video.fault is None
        first_fault = first_fault or (video.name, video.fault)
        yield video
    if first_fault is not None and not is_any_good:
        raise UserError(f"{storage.join(base, first_fault[0])}: {first_fault[1]}")


def _list_file(source: SourceConfig, base: str, entry: storage.Entry) -> Iterator[SourceVideo]:
    url = storage.resolve(base, entry.name)
    identity = file_identity(url, entry.bytes, entry.etag)
    try:
        layout = _read_layout(source, url, entry.bytes)
    except DamagedVideo as damaged:
        yield SourceVideo(
            entry.name, entry.bytes, entry.etag, member="0", identity=f"{identity}:fault", fault=str(damaged)
        )
        return
    for number in range(layout.num_videos):
        yield SourceVideo(
            name=entry.name,
            bytes=layout.video_bytes,
            etag=entry.etag,
            member=str(number),
            identity=f"{identity}:{layout.key}:{number}",
            together=None if layout.is_contiguous else identity,
        )


def _read_layout(source: SourceConfig, url: str, file_bytes: int) -> _Layout:
    """Finds the array of videos in a file.

    Raises:
        DamagedVideo: the file is damaged, or the config does not determine the array or its axes.
    """
    with storage.open_to_read(url) as file:
        if PurePosixPath(url).suffix.lower() == ".npz":
            headers = read_npz_headers(file)
            key = _find_key(source, headers)
            _find_actions(source, headers)
            header = headers[key]
        else:
            key, header = "", read_header(file, file_bytes)
    if header.dtype.kind not in "iu":
        raise DamagedVideo(f"an array of {header.dtype}; save integers from 0 to 255")
    layout = _Layout(key, header, _find_axes(source, header.shape))
    sizes = dict(zip(layout.axes, header.shape, strict=True))
    if sizes.get("C", 1) not in _CHANNELS:
        raise DamagedVideo(f"{sizes['C']} channels (axes {layout.axes} of {list(header.shape)}); there must be 1 or 3")
    if not all(layout.video_shape):
        raise DamagedVideo(f"videos without pixels: {list(header.shape)}")
    return layout


def _find_key(source: SourceConfig, headers: Mapping[str, ArrayHeader]) -> str:
    found = ", ".join(f"{name} {list(header.shape)}" for name, header in headers.items()) or "nothing"
    if source.array_key is not None:
        if source.array_key not in headers:
            raise DamagedVideo(f"no array {source.array_key!r} (found: {found}); correct data.source.array_key")
        return source.array_key
    actions = _DEFAULT_ACTIONS if source.actions is None else source.actions
    videos = [name for name, header in headers.items() if len(header.shape) >= 3 and name not in actions]
    if len(videos) != 1:
        raise DamagedVideo(f"which array holds the videos? (found: {found}); set data.source.array_key to its name")
    return videos[0]


def _find_actions(source: SourceConfig, headers: Mapping[str, ArrayHeader]) -> list[str]:
    """The names of the arrays of actions."""
    if source.actions is None:
        return [name for name in _DEFAULT_ACTIONS if name in headers]
    for name in source.actions:
        if name not in headers:
            raise DamagedVideo(f"no array {name!r} (found: {', '.join(headers)}); correct data.source.actions")
    return list(source.actions)


def _find_axes(source: SourceConfig, shape: tuple[int, ...]) -> str:
    if source.axes is not None:
        if len(source.axes) != len(shape):
            raise DamagedVideo(f"an array of {len(shape)} axes, {list(shape)}, for data.source.axes={source.axes}")
        return source.axes
    if len(shape) == 3 and shape[-1] not in _CHANNELS:
        return "THW"
    if len(shape) in (4, 5) and shape[-1] in _CHANNELS:
        return "NTHWC"[-len(shape) :]
    text = f"an array {list(shape)} is ambiguous"
    if len(shape) == 3:
        text += f": a picture, which is not a video, or {shape[0]} frames of {shape[1]} x {shape[2]} pixels (THW)"
    if len(shape) == 4:
        text += (
            f": {shape[0]} videos of {shape[1]} frames (data.source.axes=NTHW), or {shape[1]} videos of {shape[0]} "
            "frames (TNHW, as mnist_test_seq.npy)"
        )
        if shape[1] in _CHANNELS:
            text += f", or {shape[0]} frames (TCHW)"
    raise DamagedVideo(f"{text}; set data.source.axes")


def read_array(source: SourceConfig, url: str, member: str, num_bytes: int, kept: KeptFiles) -> ArrayVideo:
    """Reads the frames of one video, and its actions if an ``.npz`` file has them.

    Raises:
        DamagedVideo: the file is damaged, or has changed since the listing.
        FileNotFoundError: the file is missing.
    """
    number = int(member)
    layout = _read_layout(source, url, storage.stat(url).bytes)
    if layout.video_bytes != num_bytes or number >= layout.num_videos:
        raise DamagedVideo(f"changed since it was planned: {num_bytes} -> {layout.video_bytes} bytes")
    if layout.is_contiguous:
        video = _read_range(layout, url, number)
    else:
        array = open_array(_local_array(url, layout.key, kept))
        if array.shape != layout.header.shape:
            raise DamagedVideo("changed while it was read")
        video = array.take(number, layout.axes.index("N")) if "N" in layout.axes else np.asarray(array)
    return ArrayVideo(_rgb(video, layout.axes.replace("N", "")), _read_actions(source, layout, url, number, kept))


def _read_range(layout: _Layout, url: str, number: int) -> np.ndarray:
    with storage.open_to_read(url) as file:
        file.seek(layout.header.offset + number * layout.video_bytes)
        data = file.read(layout.video_bytes)
    if len(data) != layout.video_bytes:
        raise DamagedVideo("changed while it was read")
    return np.frombuffer(data, layout.header.dtype).reshape(layout.video_shape)


def _local_array(url: str, key: str, kept: KeptFiles) -> Path:
    """Local path of an array as an ``.npy`` file: the source's own file, or a copy."""

    def copy(path: Path) -> Path:
        if not key and storage.is_local(url):
            return storage.local_path(url)
        if not key:
            storage.fetch(url, path)
            return path
        with storage.open_to_read(url, _BLOCK_BYTES) as file:
            copy_member(file, key, path)
        return path

    return kept.get(url, f"{key}.npy", copy)


def _rgb(video: np.ndarray, axes: str) -> np.ndarray:
    """Converts frames to uint8 [num_frames, H, W, 3]."""
    if video.dtype != np.uint8:
        if video.min() < 0 or video.max() > 255:
            raise DamagedVideo(f"values from {video.min()} to {video.max()}; they must lie between 0 and 255")
        video = video.astype(np.uint8)
    if "C" not in axes:
        video, axes = video[..., None], f"{axes}C"
    video = video.transpose([axes.index(axis) for axis in "THWC"])
    return np.broadcast_to(video, (*video.shape[:3], 3))


def _read_actions(source: SourceConfig, layout: _Layout, url: str, number: int, kept: KeptFiles) -> np.ndarray | None:
    """Actions float32 [rows, action_dim]: the flattened rows of all action arrays, concatenated; None without any."""
    if not layout.key:
        return None
    with storage.open_to_read(url) as file:
        names = _find_actions(source, read_npz_headers(file))
    if not names:
        return None
    columns = []
    for name in names:
        array = open_array(_local_array(url, name, kept))
        if array.dtype.kind not in "fiub" or array.ndim < 1 + ("N" in layout.axes):
            raise DamagedVideo(
                f"{name} is {array.dtype} {list(array.shape)}; actions must be numbers, one row per frame"
            )
        if "N" in layout.axes:
            if len(array) != layout.num_videos:
                raise DamagedVideo(f"{name} has {len(array)} videos, not {layout.num_videos}")
            array = array[number]
        columns.append(np.asarray(array, np.float32).reshape(len(array), math.prod(array.shape[1:])))
    if len({len(rows) for rows in columns}) > 1:
        raise DamagedVideo(f"{', '.join(names)} have different numbers of rows")
    return np.concatenate(columns, axis=1)
