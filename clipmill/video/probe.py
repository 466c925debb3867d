"""A cheap look at a video file: what it is, and which decoder is right for it.

Cheap: the header and one frame. The frame is needed because some containers state rotation and size only there.
Which decoder is right was measured frame by frame against ffmpeg (``docs/design.md`` has the table): decord is right
and quick for small frames of a few codecs in two containers; elsewhere it fails, or skips and repeats frames silently.
"""

from __future__ import annotations

import errno
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import av

__all__ = ["DecoderChoice", "VideoError", "VideoInfo", "blame_video", "open_video", "probe"]

DecoderChoice = Literal["auto", "decord", "pyav"]

SMALL_FRAME_PIXELS = 640 * 480
"""Up to here decord is at least as quick as PyAV; above, its full-size conversion to RGB dominates."""

_DECORD_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_DECORD_CODECS = {"h264", "mjpeg", "mpeg4", "vp8", "vp9"}
_DECORD_PIXEL_FORMATS = {"yuv420p", "yuvj420p"}

_DECORD_PREFIX = re.compile(r"\[[\d:]+\] \S+: ")
"""Time of day and source line: the same fault must read the same twice."""

_ENVIRONMENT_ERRORS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}


class VideoError(Exception):
    """The video cannot be read: the message says why in one line."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself.

    Attributes:
        container: ffmpeg's name of the format (``mov,mp4,m4a,3gp,3g2,mj2``).
        codec: such as ``h264``.
        pixel_format: such as ``yuv420p``.
        width: pixels as stored, before rotation.
        height: pixels as stored, before rotation.
        rotation: degrees counter-clockwise, a multiple of 90, by which frames must be turned for display.
        fps: average frames per second.
        duration_seconds: of the video stream where the container says it, else of the file.
        container_frames: number of frames by the container's index; None where it has none.
        stream_index: the stream that both decoders read.
        decoder: the decoder that reads it.
    """

    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    rotation: int
    fps: float
    duration_seconds: float | None
    container_frames: int | None
    stream_index: int
    decoder: Literal["decord", "pyav"]


@contextmanager
def blame_video(action: str) -> Iterator[None]:
    """Turns whatever a decoder raises into a VideoError; lets memory and the environment's errors through."""
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRORS:
            raise
        reason = error.strerror if isinstance(error, av.FFmpegError) else _DECORD_PREFIX.sub("", str(error))
        first_line = (reason.strip() or type(error).__name__).splitlines()[0][:300]
        raise VideoError(f"{action}: {first_line}") from error


def open_video(path: str | Path) -> Any:
    """Opens a local file, and only that file: a playlist inside it must not make us read other places."""
    return av.open(f"file:{path}", options={"protocol_whitelist": "file"})


def probe(path: str | Path, decoder: DecoderChoice = "auto") -> VideoInfo:
    """Looks at a local video file.

    Args:
        path: local file.
        decoder: ``auto`` chooses; another value is taken as it is.

    Raises:
        VideoError: not a readable video; the message is the cause.
        OSError: the file is missing, or the disk failed.
    """
    status = Path(path).stat()
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise VideoError("the file is empty")
    with blame_video("cannot open"), open_video(path) as container:
        streams = [stream for stream in container.streams.video if not _is_picture(stream)]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams})
            raise VideoError(f"no video stream (found: {', '.join(kinds) or 'nothing'})")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        info = _describe(container, stream)
        if decoder == "auto":
            chosen = len(streams) == 1 and _decord_is_right(info, stream)
            return replace(info, decoder="decord" if chosen else "pyav")
        return replace(info, decoder=decoder)


def _is_picture(stream: Any) -> bool:
    """Cover art of an audio file is a video stream of one frame."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _describe(container: Any, stream: Any) -> VideoInfo:
    """The facts of one stream; decodes its first frame."""
    with blame_video("cannot decode the first frame"):
        stream.codec_context.thread_count = 1
        first = next(iter(container.decode(stream)), None)
    if first is None:
        raise VideoError("the video stream holds no frame")
    fps = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not fps:
        raise VideoError("the container states no frame rate")
    return VideoInfo(
        container=container.format.name,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=first.format.name,
        width=first.width,
        height=first.height,
        rotation=round(first.rotation / 90) * 90 % 360,
        fps=float(fps),
        duration_seconds=_duration_seconds(container, stream),
        container_frames=stream.frames or None,
        stream_index=stream.index,
        decoder="pyav",
    )


def _duration_seconds(container: Any, stream: Any) -> float | None:
    """The stream's own duration, else Matroska's tag of it, else the file's."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except (KeyError, ValueError):
        return None if container.duration is None else container.duration / av.time_base


def _decord_is_right(info: VideoInfo, stream: Any) -> bool:
    """Where decord was measured to deliver every frame once, and is not slower than PyAV."""
    return (
        info.container in _DECORD_CONTAINERS
        and info.codec in _DECORD_CODECS
        and info.pixel_format in _DECORD_PIXEL_FORMATS
        and info.width * info.height <= SMALL_FRAME_PIXELS
        and not _is_edited(info, stream)
    )


def _is_edited(info: VideoInfo, stream: Any) -> bool:
    """Whether an mp4's edit list delays the video or cuts frames: decord ignores that and repeats the tail.

    The demuxer applies the list to the duration but not to the number of frames.
    """
    if stream.start_time:
        return True
    if info.container_frames is None or info.duration_seconds is None:
        return False
    return abs(info.duration_seconds * info.fps - info.container_frames) > 0.5
