"""The time of each frame in seconds from the first one, for the clocks of all containers."""

from __future__ import annotations

import heapq
from fractions import Fraction
from typing import Any

import av

from clipmill.video.decoders.damage import Packet

__all__ = ["Clock", "gif_delay", "make_clock"]

_JOIN_SECONDS = 10.0
"""A larger jump of a transport stream's clock means that two recordings were joined (ffmpeg's own threshold)."""

_STEP_BACK_SECONDS = 1.0
"""A smaller step back is a damaged time, unless it leads back to the start of the recording; a larger one is a restart.
"""

_SHORTEST_GIF_DELAY, _USUAL_GIF_DELAY = Fraction(15, 1000), Fraction(1, 10)
"""In seconds: browsers replace a GIF delay below the first by the second."""


class Clock:
    """Times of frames in seconds from the first one, computed from their presentation times.

    Args:
        time_base: seconds per tick, as a fraction, so that equal ticks give equal times in every code path.
        fps: average frames per second.
        zero: ticks of the file's first frame; None takes the first frame that is requested.
        is_broken_up: whether the container's clock may restart anywhere, as in transport streams.
    """

    def __init__(self, time_base: Any, fps: float, zero: int | None, is_broken_up: bool):
        self._time_base, self._frame_seconds = Fraction(time_base), 1 / fps
        self._numerator, self._denominator = self._time_base.as_integer_ratio()
        self._zero, self._is_broken_up = zero, is_broken_up
        self._seconds: float | None = None
        self._began = 0.0  # the recording, on the clock that counts now

    def sent(self, packet: Packet) -> None:
        """Notes that a packet goes to the decoder."""

    def ticks(self, frame: Any, packet: Packet) -> int | None:
        """Presentation time of a frame by the container; None if it states none."""
        return frame.pts

    def time(self, frame: Any, packet: Packet) -> tuple[float, bool]:
        """(time of the next frame in presentation order, whether the clock restarted before it)."""
        ticks = self.ticks(frame, packet)
        if self._zero is None:
            self._zero = ticks
        before = self._seconds
        seconds = None
        if ticks is not None and self._zero is not None:
            seconds = (ticks - self._zero) * self._numerator / self._denominator
            if before is None or before < seconds <= before + _JOIN_SECONDS:  # nearly always
                self._seconds = seconds
                return seconds, False
        joined = False
        if before is not None:
            follows = before + self._frame_seconds
            if seconds is None:
                seconds = follows
            elif self._begins_anew(seconds, before):
                assert ticks is not None
                self._zero = ticks - round(follows / self._time_base)
                seconds, self._began, joined = follows, follows, True
            elif seconds <= before:  # rounding, or a damaged time
                seconds = follows
        self._seconds = seconds or 0.0
        return self._seconds, joined

    def _begins_anew(self, seconds: float, before: float) -> bool:
        """Whether a time that does not follow the one before belongs to another recording."""
        if seconds > before:
            return self._is_broken_up and seconds > before + _JOIN_SECONDS
        is_start = seconds <= self._began < before - 2 * self._frame_seconds
        return is_start or seconds < before - _STEP_BACK_SECONDS


class _FrameCounter(Clock):
    """The clock of AVI, which counts one frame per packet.

    AVI states no presentation times, and FFmpeg's guesses for B-frames are out of order. The n-th frame shown takes the
    n-th position among the packets. A packet without a frame would shift all later frames, so positions that are too
    early for a frame are skipped: B-frames come at most ``reordered`` positions late.
    """

    def __init__(self, stream: Any, fps: float, zero: int | None):
        super().__init__(stream.time_base, fps, zero, is_broken_up=False)
        self._context = stream.codec_context
        self._places: list[int] = []

    def sent(self, packet: Packet) -> None:
        """Adds the packet's position to the free ones."""
        if packet.dts is not None:
            heapq.heappush(self._places, packet.dts)

    def ticks(self, frame: Any, packet: Packet) -> int | None:
        """The first free position that is not too early."""
        reordered = self._context.reorder_depth
        while self._places and packet.dts is not None and self._places[0] < packet.dts - reordered:
            heapq.heappop(self._places)
        return heapq.heappop(self._places) if self._places else None


class _GifClock(Clock):
    """The clock of GIF: each frame starts when the delay of the one before ends, as browsers interpret delays."""

    def __init__(self, time_base: Any, fps: float):
        super().__init__(time_base, fps, 0, is_broken_up=False)
        self._next = 0

    def ticks(self, frame: Any, packet: Packet) -> int | None:
        """The end of the frame before."""
        ticks = self._next
        self._next += gif_delay(frame.duration, self._time_base)
        return ticks


def gif_delay(stated: int | None, time_base: Fraction) -> int:
    """How long browsers show a GIF frame, in ticks, whatever its file states."""
    delay = (stated or 0) * time_base
    return round((_USUAL_GIF_DELAY if delay < _SHORTEST_GIF_DELAY else delay) / time_base)


def make_clock(container: Any, stream: Any, fps: float, zero: int | None) -> Clock:
    """The clock of a stream.

    Args:
        container: PyAV's container.
        stream: PyAV's stream.
        fps: average frames per second; the distance of frames without usable times.
        zero: ticks of the file's first frame; None takes the first frame that is requested.
    """
    if container.format.name == "avi":
        return _FrameCounter(stream, fps, zero)
    if container.format.name == "gif":
        return _GifClock(stream.time_base, fps)
    return Clock(stream.time_base, fps, zero, bool(container.format.flags & av.format.Flags.ts_discont.value))
