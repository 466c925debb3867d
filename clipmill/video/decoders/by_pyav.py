"""Reading with PyAV: decodes in file order, computes times, drops damaged frames and finds new scenes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from clipmill.video.decoders.clocks import make_clock
from clipmill.video.decoders.damage import DamageFilter, ErrorLog, Packet, detect_damage
from clipmill.video.decoders.interlaced import deinterlaced
from clipmill.video.decoders.picture import Picture, Reading, Span
from clipmill.video.errors import as_video_error
from clipmill.video.geometry import Geometry, orientation_of, sample_aspect
from clipmill.video.probe import VideoInfo, open_video

__all__ = ["read_pyav"]

_DEMUX_ATTEMPTS = 8
"""After this many failures in a row without a packet, the demuxer has nothing more to deliver."""

_PACKETS_IN_DECODER = 64
"""Packets that are remembered; more than any decoder holds back."""

_NUM_REORDERED = 16
"""Largest delay by B-frames: the first frame shown is among this many packets."""

_REORDERED_SECONDS = 2.0


def read_pyav(path: str | Path, info: VideoInfo, span: Span, reading: Reading) -> Iterator[Picture]:
    """Undamaged frames by PyAV, from the start of a span or earlier. One thread: other workers use the other cores."""
    first_packet, zero = (0, None) if span[0] is None else _where_to_begin(path, info, span[0])
    with as_video_error("cannot decode", path), open_video(path) as container:
        stream = container.streams[info.stream_index]
        stream.codec_context.thread_count = 1
        stream.codec_context.copy_opaque = True
        detect_damage(stream)
        pictures = iter(_Decoding(container, stream, info, reading, first_packet, zero, span[0]))
        yield from deinterlaced(pictures) if info.interlaced else pictures


class _Decoding:
    """Decodes one stream: drops damaged frames, computes times, and finds where scenes begin."""

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
            info.codec,
            1 / (info.fps * float(stream.time_base)),
            has_times=info.container != "avi" and not info.interlaced,
            flags_early=info.container == "mpegts",
        )
        self._log = ErrorLog(stream)
        self._packets: dict[int | None, Packet] = {}  # the newest packets by presentation time
        self._num_frames = 0
        self._failed: set[int] = set()  # packets that are counted as lost frames
        self._is_broken = False  # a frame was dropped after the last one that was delivered

    def __iter__(self) -> Iterator[Picture]:
        for demuxed, packet in self._demux():
            for frame in self._decode(demuxed, packet):
                self._take(frame, frame.opaque or self._packets.get(frame.pts, packet))
            if judged := self._damage.judged():
                yield from self._whole(judged)
        self._reading.damaged_frames += self._damage.num_never_shown()
        yield from self._whole(self._damage.judged(at_end=True))

    def _whole(self, judged: list[tuple[Picture, bool, bool]]) -> list[Picture]:
        """The undamaged pictures; the damaged ones are counted."""
        whole = []
        for picture, is_whole, is_first in judged:
            self._is_broken |= is_first or not is_whole
            if is_whole:
                whole.append(picture._replace(begins_scene=True) if self._is_broken else picture)
                self._is_broken = False
            elif picture.seconds >= self._counts_from:
                self._reading.damaged_frames += 1
        return whole

    def _take(self, frame: Any, packet: Packet) -> None:
        """Computes the time of the next frame in presentation order, and passes it to the damage filter."""
        if packet.number in self._failed:  # the decoder returned a frame after all
            self._count_lost(packet, -1)
        seconds, started_over = self._clock.time(frame, packet)
        if started_over:
            self._reading.joins += 1
            self._damage.starts_over(packet)
        num_missing = self._damage.shown(packet)
        if num_missing and seconds >= self._counts_from:
            self._reading.damaged_frames += num_missing
        self._num_frames += num_missing
        geometry = Geometry(frame.width, frame.height, packet.sample_aspect, orientation_of(frame))
        begins_scene = started_over or num_missing > 0
        self._damage.add(Picture(self._num_frames, frame, seconds, geometry, begins_scene), frame, packet)
        self._num_frames += 1

    def _decode(self, demuxed: Any, packet: Packet) -> list[Any]:
        """The frames that the decoder returns for a packet."""
        packets, pts = self._packets, packet.pts
        if pts is None or pts in packets:
            demuxed.opaque = packet
        else:  # decoders keep the time, and attaching a reference to the packet would cost more
            packets[pts] = packet
            if len(packets) > _PACKETS_IN_DECODER:
                del packets[next(iter(packets))]
        if demuxed.size:
            self._clock.sent(packet)
            self._damage.sent(packet)
        if self._log.has_grown():  # logged while the packet was read: the data before it is damaged or lost
            self._damage.starts_over(packet)
        try:
            frames = demuxed.decode()
        except MemoryError:
            raise
        except EOFError:  # drained
            return []
        except av.FFmpegError as error:  # the following packets can still be decoded
            self._reading.cause = self._reading.cause or error.strerror
            if not self._damage.will_be_missing(packet):
                self._count_lost(packet, 1)
            self._damage.failed(packet)
            return []
        if self._log.tells_of_decoding and self._log.has_grown():
            self._damage.failed(packet)
        if demuxed.is_discard and demuxed.is_keyframe:
            self._damage.cut(packet)
        packet.sample_aspect = sample_aspect(self._stream, self._codec_aspect)
        return frames

    def _count_lost(self, packet: Packet, change: int) -> None:
        """Counts a packet as a lost frame (``change`` 1), or takes it back (-1)."""
        (self._failed.add if change > 0 else self._failed.discard)(packet.number)
        self._num_frames += change
        self._reading.damaged_frames += change

    def _demux(self) -> Iterator[tuple[Any, Packet]]:
        """All packets from the first needed one on, including those after a damaged part of the file."""
        failures = number = 0
        packets = self._container.demux(self._stream)
        while True:
            self._log.has_grown()  # ignore earlier entries: encoders and muxers of this process log too
            try:
                demuxed = next(packets, None)
                if demuxed is None:
                    return
                failures = 0
                if number >= self._first_packet:
                    yield demuxed, Packet(number, demuxed.is_keyframe, demuxed.is_corrupt, demuxed.pts, demuxed.dts)
                number += 1
            except av.error.InvalidDataError as error:
                failures += 1
                self._reading.cause = self._reading.cause or error.strerror
                if failures == _DEMUX_ATTEMPTS:
                    return
                packets = self._container.demux(self._stream)


def _where_to_begin(path: str | Path, info: VideoInfo, start_seconds: float) -> tuple[int, int | None]:
    """(number of the first packet to decode, ticks of the file's first frame), for a span.

    Decoding begins at the second-last key frame at or before the span's start, because frames of an open group of
    pictures refer to the group before. Packets are counted, because seeking is not exact in all formats.
    """
    # The clocks of others may restart. AVI has none: a B-frame that is not decoded would shift all frames after it.
    if not info.container.startswith(("mov", "matroska")):
        return 0, None
    zero: int | None = None
    keys = deque([0], maxlen=2)
    with as_video_error("cannot read", path), open_video(path) as container:
        stream = container.streams[info.stream_index]
        for number, packet in enumerate(container.demux(stream)):
            ticks = packet.pts
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
