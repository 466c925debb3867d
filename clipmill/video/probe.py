"""A cheap probe of a video file: its properties, and which decoder reads it.

The probe reads the header, the first frame and the times of some packets. Some containers state size and orientation
only in the frame, and not every container states a frame rate.

``auto`` is PyAV. Its frames were compared one by one with the frames that were written (table in ``docs/formats.md``).
With one resizer for both decoders, PyAV is faster than decord at every size from 64 x 48 to 1920 x 1080
(``benchmarks/shard.py``). decord refuses some files, and silently skips and repeats frames of others, so it is used on
request only.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av

from clipmill.video import demuxers
from clipmill.video.decoders.by_pillow import is_animation, read_animation
from clipmill.video.errors import VideoError, as_video_error
from clipmill.video.geometry import Geometry, Orientation, orientation_of, sample_aspect
from clipmill.video.rate import NUM_TIMED_PACKETS, PacketTimes, frame_rate, rate_of_seconds

__all__ = ["DecoderChoice", "VideoInfo", "open_video", "probe"]

DecoderChoice = Literal["auto", "decord", "pyav"]


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video file.

    Attributes:
        container: ffmpeg's name of the format (``mov,mp4,m4a,3gp,3g2,mj2``).
        codec: ffmpeg's name of the codec (``h264``).
        pixel_format: ffmpeg's name of the pixel format (``yuv420p``).
        width: stored width of the first frame in pixels.
        height: stored height of the first frame in pixels.
        rotation: rotation of the first frame for display, in degrees counter-clockwise, a multiple of 90.
        fps: average frames per second.
        duration_seconds: time from the first frame to the end of the last one, of the video stream if the container
            states it, else of the file; None if neither is stated.
        container_frames: number of frames in the container's index; None without an index.
        stream_index: index of the stream that both decoders read.
        decoder: the decoder that reads the file; ``pillow`` for animated WebP and PNG.
        interlaced: whether frames interleave two fields; PyAV deinterlaces them.
        mirrored: whether the first frame is mirrored left to right before it is rotated.
        sample_aspect: width of the first frame's pixels divided by their height.
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
    decoder: Literal["decord", "pyav", "pillow"]
    interlaced: bool = False
    mirrored: bool = False
    sample_aspect: float = 1.0

    @property
    def geometry(self) -> Geometry:
        """How the first frame is shown."""
        return Geometry(self.width, self.height, self.sample_aspect, Orientation.of(self.rotation, self.mirrored))


def open_video(path: str | Path) -> Any:
    """Opens a local file, and only that file, as a video.

    Raises:
        VideoError: its content is a playlist, a picture, text or audio.
        av.FFmpegError: it cannot be opened.
    """
    try:
        # Titles in AVI and FLV files may have any encoding; clipmill does not use them.
        return av.open(f"file:{path}", options=demuxers.OPTIONS, metadata_errors="replace")
    except av.ArgumentError as error:  # FFmpeg's error for a format that is not on the list
        raise VideoError("cannot open: not in a video format (a playlist, a picture, text or audio)") from error


def probe(path: str | Path, decoder: DecoderChoice = "auto") -> VideoInfo:
    """Probes a local video file.

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
    if stat.S_ISREG(status.st_mode) and is_animation(path):
        return _describe_animation(path)
    with as_video_error("cannot open", path), open_video(path) as container:
        streams = [stream for stream in container.streams.video if not _is_picture(stream)]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams})
            raise VideoError(f"no video stream (found: {', '.join(kinds) or 'nothing'})")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise VideoError("no decoder knows the codec of its video stream")
        return _describe(container, stream, path, decoder)


def _is_picture(stream: Any) -> bool:
    """Whether a stream is the cover art of an audio file, which is a video stream of one frame."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _describe(container: Any, stream: Any, path: str | Path, decoder: DecoderChoice) -> VideoInfo:
    """The properties of one stream. Decodes its first frame."""
    context = stream.codec_context
    context.thread_count = 1
    codec_aspect = context.sample_aspect_ratio
    with as_video_error("cannot decode the first frame", path):
        first, packets = _look_in(container, stream)
    orientation = orientation_of(first)
    return VideoInfo(
        container=container.format.name,
        codec=context.codec.canonical_name,
        pixel_format=first.format.name,
        width=first.width,
        height=first.height,
        rotation=orientation.rotation,
        fps=frame_rate(container, stream, packets),
        duration_seconds=_duration_seconds(container, stream),
        container_frames=stream.frames or None,
        stream_index=stream.index,
        # decord rotates frames itself, but does not mirror them as players do.
        decoder="decord" if decoder == "decord" and not orientation.mirrors else "pyav",
        interlaced=bool(first.interlaced_frame),
        mirrored=orientation.mirrors,
        sample_aspect=sample_aspect(stream, codec_aspect),
    )


def _describe_animation(path: str | Path) -> VideoInfo:
    frames, info = read_animation(path)
    times = [seconds for seconds, _ in frames]
    return VideoInfo(
        container=info.format,
        codec=info.format,
        pixel_format="rgba" if info.has_alpha else "rgb24",
        width=info.width,
        height=info.height,
        rotation=0,
        fps=rate_of_seconds(times),
        duration_seconds=None,
        container_frames=info.num_frames,
        stream_index=0,
        decoder="pillow",
    )


def _look_in(container: Any, stream: Any) -> tuple[Any, list[PacketTimes]]:
    """The first frame that can be decoded, and the times of the first packets.

    Raises:
        VideoError: there is no such frame.
    """
    first, cause = None, "the video stream holds no frame"
    times: list[PacketTimes] = []
    packets = container.demux(stream)
    while first is None or len(times) < NUM_TIMED_PACKETS:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            if packet.size and not packet.is_discard:
                times.append(PacketTimes(packet.pts, packet.dts, packet.duration))
            if first is None:
                first = next(iter(packet.decode()), None)
        except av.error.InvalidDataError as error:  # damage costs frames, not the video; the generator ends at it
            cause = f"cannot decode the first frame: {error.strerror}"
    if first is None:
        raise VideoError(cause)
    return first, times


_DURATION_FROM_ZERO = ("matroska,webm", "nut", "asf", "flv")
"""Containers whose duration counts from time zero, even if the first frame comes later."""


def _duration_seconds(container: Any, stream: Any) -> float | None:
    """The stream's own duration, else that of Matroska's tag, else the file's; None if none is stated."""
    seconds = None if container.duration is None else container.duration / av.time_base
    counts_from_zero = container.format.name in _DURATION_FROM_ZERO
    if stream.duration is not None:
        seconds, counts_from_zero = float(stream.duration * stream.time_base), False
    elif (tag := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))) is not None:
        hours, minutes, rest = tag.groups()
        seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest)
    if seconds is None or not counts_from_zero or stream.start_time is None:
        return seconds
    start = max(0.0, float(stream.start_time * stream.time_base))
    return seconds - start if start < seconds else seconds
