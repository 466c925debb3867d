"""The frame rate of a video, by its timestamps where its container states none.

FFmpeg guesses a rate for such files: 1000 frames per second for Matroska, or twice the true rate.
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
"""Packets whose times are looked at: few seconds of most videos, little of their files."""

_NUM_REORDERED = 16
"""B-frames come at most this many packets late: the last times of a list of packets may have gaps."""

_PAUSE = 4
"""A step longer than this multiple of the median is a pause; it says nothing about the rate."""

_TOLERANCE = 0.02

_FASTEST_GUESS = 120
"""A greater rate of a single frame is FFmpeg's guess."""


class PacketTimes(NamedTuple):
    """When a packet's frame is shown, when it is decoded, and how long it is shown, in ticks."""

    pts: int | None
    dts: int | None
    duration: int | None


def frame_rate(container: Any, stream: Any, times: Sequence[PacketTimes]) -> float:
    """Average frames per second of a stream.

    The stated rate holds where the timestamps agree with it. Otherwise the rate of the timestamps holds, without
    pauses: a clip that is stored at this rate plays at its true speed. AVI has no timestamps, but empty chunks where
    the picture stays: its rate follows from the places of the others. A raw stream has the rate that its codec states.

    Args:
        container: of PyAV.
        stream: of PyAV.
        times: of its first packets, in the order of the file.
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
    """Least and greatest rate of the median step, which a lost frame here and there does not change."""
    step = median(late - early for early, late in pairwise(ticks))
    return float(1 / ((step + 1) * time_base)), float(1 / (max(step - 1, 0.5) * time_base))


def rate_of_seconds(times: Sequence[float]) -> float:
    """Average frames per second of frames that are shown at these times, ascending; 1 for a single frame."""
    measured = _rate_of_ticks([round(seconds * 1000) for seconds in times])
    return 1.0 if measured is None else _usual_rate(*(float(limit * 1000) for limit in measured))


def _frames_per_chunk(places: Sequence[int]) -> float:
    """1 where most chunks hold a frame, so that a lost one here and there counts as such.

    Args:
        places: of the chunks that hold a frame, ascending.
    """
    steps = [late - early for early, late in pairwise(places)]
    usual = median(steps) if steps else 1
    kept = [step for step in steps if step <= _PAUSE * usual]
    return 1.0 if usual <= 1 else len(kept) / sum(kept)


def _complete(times: Sequence[int | None]) -> list[int]:
    """The times of packets in order, up to where the packets that were looked at hold all of them."""
    ordered = sorted({ticks for ticks in times if ticks is not None})
    if len(times) < NUM_TIMED_PACKETS:
        return ordered
    return ordered[: -min(_NUM_REORDERED, len(ordered) // 2)]


def _rate_of_ticks(times: Sequence[int]) -> tuple[Fraction, Fraction] | None:
    """Frames per tick: the least and the greatest rate that the times, each rounded to a tick, allow.

    Args:
        times: of frames in ticks, ascending, without repetition.

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
