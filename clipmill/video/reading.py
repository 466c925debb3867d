"""The whole frames of a video, strictly in order, with their times: by PyAV, Pillow, or decord where it is asked for.

Why strictly in order: seeking silently delivers wrong frames for several codecs, in both decoders; reading everything
and taking every n-th frame never does.

Damaged frames are dropped (`damage.py`). Reading goes on behind them, in a new scene.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np

from clipmill.video.animated import read_animation
from clipmill.video.clocks import make_clock
from clipmill.video.damage import DamageFilter, ErrorLog, Packet, detect_damage
from clipmill.video.faults import VideoError, blame_video
from clipmill.video.geometry import Geometry, orientation_of, sample_aspect
from clipmill.video.probe import VideoInfo, open_video

__all__ = ["Picture", "Reading", "Span", "span_seconds", "whole_frames"]

Span = tuple[float | None, float | None]
"""The frames that are shown from the first time on and before the second, in seconds from the file's first frame."""

_DEMUX_ATTEMPTS = 8
"""A demuxer that fails this often in a row, without a packet in between, has nothing more to give."""


@dataclass
class Reading:
    """What reading a video has found so far; it grows while frames are read.

    Attributes:
        num_frames: whole frames that were delivered.
        number: of the newest of them among all frames of the video or span, damaged ones included, from 0.
        damaged_frames: frames that were dropped: damaged, or before a key frame.
        joins: places where the clock begins anew, since recordings were joined.
        scene_starts: numbers of the frames at which a new scene begins: after damage, at a join, or where size or
            orientation change.
        first_seconds: time of the first delivered frame.
        last_seconds: time of the last delivered frame.
        cause: of the first damage, in one line; None without damage.
    """

    num_frames: int = 0
    number: int = -1
    damaged_frames: int = 0
    joins: int = 0
    scene_starts: set[int] = field(default_factory=set)
    first_seconds: float = 0.0
    last_seconds: float = 0.0
    cause: str | None = None


class Picture(NamedTuple):
    """One whole frame.

    Attributes:
        number: among all frames that were decoded, from 0; a lost frame has one as well.
        frame: `av.VideoFrame` as stored.
        seconds: its presentation time, from the first frame of the file.
        geometry: how it is shown.
        begins_scene: whether it does not continue the frame before.
    """

    number: int
    frame: Any
    seconds: float
    geometry: Geometry
    begins_scene: bool


def span_seconds(info: VideoInfo, span: Span) -> float | None:
    """Duration of the part of a video that lies in a span; None where neither of them tells."""
    start, end = span
    ends = [seconds for seconds in (end, info.duration_seconds) if seconds is not None]
    return min(ends) - (start or 0.0) if ends else None


def whole_frames(path: str | Path, info: VideoInfo, span: Span, reading: Reading) -> Iterator[Picture]:
    """Every whole frame of a video within a span, once, in presentation order.

    Args:
        path: local file.
        info: its probe, which fixes stream and decoder.
        span: which frames; (None, None): all of them.
        reading: is updated on the way.

    Raises:
        VideoError: the file cannot be decoded at all.
    """
    if info.decoder == "pyav":
        pictures = _read_pyav(path, info, span, reading)
    else:
        pictures = (_read_decord if info.decoder == "decord" else _read_pillow)(path, info)
    start, end = span
    geometry: Geometry | None = None
    first_number = 0
    for picture in pictures:
        if start is not None and picture.seconds < start - _ROUNDING_SECONDS:
            first_number = picture.number + 1
            continue
        if end is not None and picture.seconds >= end - _ROUNDING_SECONDS:
            return
        reading.number = picture.number - first_number
        if reading.num_frames and (picture.begins_scene or picture.geometry != geometry):
            reading.scene_starts.add(reading.number)
        geometry = picture.geometry
        if not reading.num_frames:
            reading.first_seconds = picture.seconds
        reading.last_seconds = picture.seconds
        reading.num_frames += 1
        yield picture


_ROUNDING_SECONDS = 0.001
"""Containers round times to milliseconds; tables of spans often do as well."""


def _read_pyav(path: str | Path, info: VideoInfo, span: Span, reading: Reading) -> Iterator[Picture]:
    """Whole frames by PyAV, from the start of a span on or before it; one thread: other workers use the other cores."""
    first_packet, zero = (0, None) if span[0] is None else _where_to_begin(path, info, span[0])
    with blame_video("cannot decode", path), open_video(path) as container:
        stream = container.streams[info.stream_index]
        stream.codec_context.thread_count = 1
        stream.codec_context.copy_opaque = True
        detect_damage(stream)
        pictures = iter(_Decoding(container, stream, info, reading, first_packet, zero, span[0]))
        yield from _deinterlaced(pictures) if info.interlaced else pictures


class _Decoding:
    """Decodes one stream: drops damaged frames, tells the time, and finds where scenes begin."""

    def __init__(
        self,
        container: Any,
        stream: Any,
        info: VideoInfo,
        reading: Reading,
        first_packet: int,
        zero: int | None,
        counts_from: float | None,
    ):
        self._container, self._stream = container, stream
        self._codec_aspect = stream.codec_context.sample_aspect_ratio
        self._reading, self._counts_from = reading, counts_from or -math.inf
        self._first_packet = first_packet
        self._clock = make_clock(container, stream, info.fps, zero)
        self._damage: DamageFilter[Picture] = DamageFilter(
            1 / (info.fps * float(stream.time_base)),
            flags_early=info.container == "mpegts",
            fails_late=info.codec == "av1",
        )
        self._log = ErrorLog(container, stream)
        self._num_frames = 0
        self._failed: set[int] = set()  # packets that count as a lost frame

    def __iter__(self) -> Iterator[Picture]:
        for demuxed, packet in self._demux():
            for frame in self._decode(demuxed, packet):
                self._take(frame)
            yield from self._whole(self._damage.judged())
        yield from self._whole(self._damage.judged(at_end=True))

    def _whole(self, judged: list[tuple[Picture, bool, bool]]) -> Iterator[Picture]:
        """Those pictures that are whole; counts the others."""
        for picture, is_whole, is_first in judged:
            if is_whole:
                yield picture._replace(begins_scene=True) if is_first else picture
            elif picture.seconds >= self._counts_from:
                self._reading.damaged_frames += 1

    def _take(self, frame: Any) -> None:
        """Tells the time of the next frame in presentation order, and has its damage judged."""
        packet: Packet = frame.opaque
        if packet.number in self._failed:  # the decoder made a frame of it all the same
            self._count_lost(packet, -1)
        seconds, started_over = self._clock.time(frame, packet)
        if started_over:
            self._reading.joins += 1
            self._damage.started_over(packet)
        geometry = Geometry(frame.width, frame.height, packet.sample_aspect, orientation_of(frame))
        self._damage.add(Picture(self._num_frames, frame, seconds, geometry, started_over), frame, packet)
        self._num_frames += 1

    def _decode(self, demuxed: Any, packet: Packet) -> list[Any]:
        """The frames that a packet brings out of the decoder."""
        demuxed.opaque = packet
        if demuxed.size:
            self._clock.sent(packet)
            self._damage.sent(packet)
        if self._log.has_grown(packet, is_decoded=False):
            self._damage.failed(packet)
        try:
            frames = demuxed.decode()
        except MemoryError:
            raise
        except EOFError:  # drained
            return []
        except av.FFmpegError as error:  # the following packets can be decoded all the same
            self._reading.cause = self._reading.cause or error.strerror
            self._count_lost(packet, 1)
            self._damage.failed(packet)
            return []
        if self._log.has_grown(packet, is_decoded=True):
            self._damage.failed(packet)
        if demuxed.is_discard and demuxed.is_keyframe:
            self._damage.cut(packet)
        packet.sample_aspect = sample_aspect(self._stream, self._codec_aspect)
        return frames

    def _count_lost(self, packet: Packet, change: int) -> None:
        """Counts a packet as a frame that nobody will see, or no longer."""
        (self._failed.add if change > 0 else self._failed.discard)(packet.number)
        self._num_frames += change
        self._reading.damaged_frames += change

    def _demux(self) -> Iterator[tuple[Any, Packet]]:
        """All packets from the first that is needed on, also those behind a damaged part of the file."""
        failures = number = 0
        while True:
            try:
                for demuxed in self._container.demux(self._stream):
                    failures = 0
                    if number >= self._first_packet:
                        yield (
                            demuxed,
                            Packet(number, demuxed.is_keyframe, demuxed.is_corrupt, demuxed.pts, demuxed.dts),
                        )
                    number += 1
                return
            except av.error.InvalidDataError as error:
                failures += 1
                self._reading.cause = self._reading.cause or error.strerror
                if failures == _DEMUX_ATTEMPTS:
                    return


def _where_to_begin(path: str | Path, info: VideoInfo, start_seconds: float) -> tuple[int, int | None]:
    """(number of the packet from which to decode, ticks of the file's first frame), for a span.

    Decoding begins at a key frame, one before the last that comes early enough: the frames of an open group of
    pictures refer to the group before. Packets are counted rather than sought, since seeking is not exact everywhere.
    """
    if not info.container.startswith(("mov", "matroska", "avi")):  # others may begin their clocks anew
        return 0, None
    counts_frames = info.container == "avi"
    zero: int | None = None
    keys = deque([0], maxlen=2)
    with blame_video("cannot read", path), open_video(path) as container:
        stream = container.streams[info.stream_index]
        for number, packet in enumerate(container.demux(stream)):
            ticks = packet.dts if counts_frames else packet.pts
            if ticks is None or packet.is_discard:
                continue
            if number < _NUM_REORDERED:
                zero = ticks if zero is None else min(zero, ticks)
            assert zero is not None
            seconds = float((ticks - zero) * stream.time_base)
            if packet.is_keyframe and seconds <= start_seconds:
                keys.append(number)
            elif number >= _NUM_REORDERED and seconds > start_seconds + _REORDERED_SECONDS:
                break
    return keys[0], zero


_NUM_REORDERED = 16
"""Frames that B-frames can delay: the first one shown is among so many packets."""
_REORDERED_SECONDS = 2.0


# -------------------------------------------------------------------------------------------- interlaced video


def _deinterlaced(pictures: Iterator[Picture]) -> Iterator[Picture]:
    """One whole picture for each frame that weaves two moments; all else stays as it is."""
    graph: Any = None
    shape = None
    waiting: deque[Picture] = deque()

    def filtered(frame: Any) -> Iterator[Picture]:
        """What the graph gives once it has a frame, or has got its last one (None)."""
        graph.push(frame)
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                whole = graph.pull()
                yield waiting.popleft()._replace(frame=whole)

    for picture in pictures:
        frame = picture.frame
        if picture.begins_scene or shape != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                yield from filtered(None)
            graph, shape = _deinterlacer(frame), (frame.width, frame.height, frame.format.name)
        waiting.append(picture)
        yield from filtered(frame)
    if graph is not None:
        yield from filtered(None)


def _deinterlacer(frame: Any) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    bwdif, sink = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


# ---------------------------------------------------------------------------------------- the other two decoders


def _read_pillow(path: str | Path, info: VideoInfo) -> Iterator[Picture]:
    """All frames of an animated WebP or PNG."""
    frames, _ = read_animation(path)
    for number, (seconds, pixels) in enumerate(frames):
        yield Picture(number, av.VideoFrame.from_ndarray(pixels, format="rgb24"), seconds, info.geometry, False)


def _read_decord(path: str | Path, info: VideoInfo) -> Iterator[Picture]:
    """All frames by decord, which tells no damage apart: it fails, or repeats the last good frame."""
    import decord  # here: it maps an FFmpeg of its own, which no other decoder needs

    decord.logging.set_level(decord.logging.ERROR)
    with blame_video("cannot decode", path):
        times = _packet_times(path, info)  # exact: decord's own are float32
        # A frame that fails is repeated from the last good one in silence, unless none may fail.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-6)
        if len(reader) != len(times):
            raise VideoError(f"decord counts {len(reader)} frames where the demuxer finds {len(times)}")
        for number, time in enumerate(times):
            pixels = reader.next().asnumpy()
            # decord turns frames upright by itself where FFmpeg 4.1 knew rotation, in MP4 and MOV: back, so that one
            # place does it for both.
            if info.rotation and info.container.startswith("mov"):
                pixels = np.ascontiguousarray(np.rot90(pixels, -info.rotation // 90))
            frame = av.VideoFrame.from_numpy_buffer(pixels, format="rgb24")
            geometry = info.geometry._replace(width=frame.width, height=frame.height)
            yield Picture(number, frame, time, geometry, begins_scene=False)


def _packet_times(path: str | Path, info: VideoInfo) -> list[float]:
    """Presentation times of all frames in seconds from the first, in order, without decoding."""
    ticks = []
    with open_video(path) as container:
        stream = container.streams[info.stream_index]
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError("damaged packets")
            if packet.pts is not None:
                ticks.append(packet.pts)
        ticks.sort()
        return [float((tick - ticks[0]) * stream.time_base) for tick in ticks]
