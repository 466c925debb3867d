"""The frame rate of a video. It is measured from timestamps if the container states none.

For such files FFmpeg's guess is wrong: 1000 frames per second for Matroska, or twice the true rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from statistics import median
from typing import Any, NamedTuple

from clipmill.video.decoders.clocks import gif_delay

__all__ = ["NUM_TIMED_PACKETS", "PacketTimes", "frame_rate", "rate_of_seconds"]

NUM_TIMED_PACKETS = 128
"""Packets whose times are read: a few seconds of most videos, and a small part of their files."""

_NUM_REORDERED = 16
"""B-frames come at most this many packets late, so the times of the last packets may have gaps."""

_PAUSE = 4
"""A step longer than this multiple of the median is a pause and is ignored."""

_TOLERANCE = 0.02

_FASTEST_GUESS = 120
"""For a single frame, a higher stated rate is FFmpeg's guess and is ignored."""


class PacketTimes(NamedTuple):
    """When a packet's frame is shown, when it is decoded, and how long it is shown, in ticks."""

    pts: int | None
    dts: int | None
    duration: int | None


def frame_rate(container: Any, stream: Any, times: Sequence[PacketTimes]) -> float:
    """Average frames per second of a stream.

    The stated rate is used if the timestamps agree with it. Otherwise the rate is measured from the timestamps without
    pauses, so that a clip stored at this rate plays at its true speed. AVI has no timestamps; it has empty chunks where
    the picture does not change, so its rate follows from the positions of the other chunks. A raw stream has the rate
    that its codec states.

    Args:
        container: PyAV's container.
        stream: PyAV's stream.
        times: times of the first packets, in file order.
    """
    if container.format.name == "gif":
        return _gif_rate(times, stream.time_base)
    stated = stream.average_rate or stream.guessed_rate
    if all(packet.pts is None for packet in times):  # raw streams: the demuxer claims 25, the codec may say better
        stated = stream.codec_context.framerate or stated
    if container.format.name == "avi":
        return float(stated or 1) * _frames_per_chunk([packet.dts for packet in times if packet.dts is not None])
    ticks = _complete([packet.pts for packet in times])
    measured = _rate_of_ticks(ticks)
    if measured is None:
        return float(stated) if stated and stated <= _FASTEST_GUESS else 1.0
    lower, upper = (float(limit / stream.time_base) for limit in measured)
    if stated and (_agrees(stated, lower, upper) or _agrees(stated, *_usual_steps(ticks, stream.time_base))):
        return float(stated)
    return _usual_rate(lower, upper)


def _gif_rate(times: Sequence[PacketTimes], time_base: Fraction) -> float:
    """Of frames that are shown as long as browsers show them, whatever the timestamps say."""
    ends = accumulate(gif_delay(packet.duration, time_base) for packet in times)
    measured = _rate_of_ticks([0, *list(ends)[:-1]])
    return 1.0 if measured is None else _usual_rate(*(float(limit / time_base) for limit in measured))


def _agrees(rate: Fraction, lower: float, upper: float) -> bool:
    return lower * (1 - _TOLERANCE) <= rate <= upper * (1 + _TOLERANCE)


def _usual_steps(ticks: Sequence[int], time_base: Fraction) -> tuple[float, float]:
    """Lower and upper limit of the rate by the median step, which single lost frames do not change."""
    step = median(late - early for early, late in pairwise(ticks))
    return float(1 / ((step + 1) * time_base)), float(1 / (max(step - 1, 0.5) * time_base))


def rate_of_seconds(times: Sequence[float]) -> float:
    """Average frames per second of frames shown at these ascending times; 1 for a single frame."""
    measured = _rate_of_ticks([round(seconds * 1000) for seconds in times])
    return 1.0 if measured is None else _usual_rate(*(float(limit * 1000) for limit in measured))


def _frames_per_chunk(places: Sequence[int]) -> float:
    """Share of AVI chunks that hold a frame; 1 if most do, so that single empty chunks count as lost frames.

    Args:
        places: positions of the chunks that hold a frame, ascending.
    """
    steps = [late - early for early, late in pairwise(places)]
    usual = median(steps) if steps else 1
    kept = [step for step in steps if step <= _PAUSE * usual]
    return 1.0 if usual <= 1 else len(kept) / sum(kept)


def _complete(times: Sequence[int | None]) -> list[int]:
    """The sorted times of the packets, without the last ones, which may have gaps (see `_NUM_REORDERED`)."""
    ordered = sorted({ticks for ticks in times if ticks is not None})
    if len(times) < NUM_TIMED_PACKETS:
        return ordered
    return ordered[: -min(_NUM_REORDERED, len(ordered) // 2)]


def _rate_of_ticks(times: Sequence[int]) -> tuple[Fraction, Fraction] | None:
    """Frames per tick: lower and upper limit of the rate, given that each time is rounded to a tick.

    Args:
        times: times of frames in ticks, strictly ascending.

    Returns:
        None for fewer than two frames.
    """
    steps = [late - early for early, late in pairwise(times)]
    if not steps:
        return None
    usual = median(steps)
    kept = [step for step in steps if step <= _PAUSE * usual]
    error = 1 + len(steps) - len(kept)
    return Fraction(len(kept), sum(kept) + error), Fraction(len(kept), max(sum(kept) - error, 1))


def _usual_rate(lower: float, upper: float) -> float:
    """The whole or NTSC rate (24000 / 1001 and so on) within the limits, else their mean."""
    middle = (lower + upper) / 2
    for divisor in (1.0, 1.001):
        rate = round(middle * divisor) / divisor
        if lower <= rate <= upper:
            return rate
    return middle
