"""A cheap look at a video file: what it is, and who reads it.

Cheap: the header and one frame. The frame is needed because some containers state rotation and size only there.
``auto`` is PyAV: it was measured frame by frame against what was written (``docs/formats.md`` has the table), and with
one resizer for all it is quicker than decord at every size from 64 x 48 to 1920 x 1080 (``benchmarks/shard.py``).
decord fails for some files, and skips and repeats frames of others silently: it reads where it is asked for.
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

__all__ = ["DecoderChoice", "VideoError", "VideoInfo", "blame_video", "decoded_frames", "open_video", "probe"]

DecoderChoice = Literal["auto", "decord", "pyav"]

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
        interlaced: frames weave two moments; PyAV's are deinterlaced.
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
    interlaced: bool = False


@contextmanager
def blame_video(action: str, path: str | Path) -> Iterator[None]:
    """Turns what a decoder raises about a file into a VideoError; lets memory and the environment's errors through."""
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRORS and not _is_demuxers_own(error, path):
            raise
        reason = error.strerror if isinstance(error, av.FFmpegError) else _DECORD_PREFIX.sub("", str(error))
        first_line = (reason.strip() or type(error).__name__).splitlines()[0][:300]
        raise VideoError(f"{action}: {first_line}") from error


def _is_demuxers_own(error: OSError, path: str | Path) -> bool:
    """Whether FFmpeg speaks of an I/O error where there is none: Matroska's demuxer does so for a file that is cut."""
    if not isinstance(error, av.FFmpegError):
        return False
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def open_video(path: str | Path) -> Any:
    """Opens a local file, and only that file: a playlist inside it must not make us read other places."""
    # Titles in AVI and FLV files are in whatever encoding their writers used; nobody here reads them.
    return av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")


def probe(path: str | Path, decoder: DecoderChoice = "auto") -> VideoInfo:
    """Looks at a local video file.

    Args:
        path: local file.
        decoder: ``auto`` is PyAV.

    Raises:
        VideoError: not a readable video; the message is the cause.
        OSError: the file is missing, or the disk failed.
    """
    status = Path(path).stat()
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise VideoError("the file is empty")
    with blame_video("cannot open", path), open_video(path) as container:
        streams = [stream for stream in container.streams.video if not _is_picture(stream)]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams})
            raise VideoError(f"no video stream (found: {', '.join(kinds) or 'nothing'})")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        info = _describe(container, stream, path)
        return replace(info, decoder="decord" if decoder == "decord" else "pyav")


def decoded_frames(container: Any, stream: Any) -> Iterator[Any]:
    """All frames of a stream up to the first damaged packet, of which a decoder would make a frame up."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            yield from stream.decode()  # what the decoder holds back for reordering
            return
        yield from packet.decode()  # the last packet is empty and does the same


def _is_picture(stream: Any) -> bool:
    """Cover art of an audio file is a video stream of one frame."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _describe(container: Any, stream: Any, path: str | Path) -> VideoInfo:
    """The facts of one stream; decodes its first frame."""
    if stream.codec_context is None:
        raise VideoError("no decoder knows the codec of its video stream")
    with blame_video("cannot decode the first frame", path):
        stream.codec_context.thread_count = 1
        first = next(decoded_frames(container, stream), None)
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
        interlaced=bool(first.interlaced_frame),
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
