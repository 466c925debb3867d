"""The undamaged frames of a video, strictly in order, with their times: by PyAV, Pillow, or on request decord.

Frames are read strictly in order, because seeking silently delivers wrong frames for several codecs, in both decoders.
Reading everything and keeping every n-th frame never does.

Damaged frames are dropped (`damage.py`). Reading continues after them, in a new scene.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from clipmill.video.decoders.by_decord import read_decord
from clipmill.video.decoders.by_pillow import read_pillow
from clipmill.video.decoders.by_pyav import read_pyav
from clipmill.video.decoders.picture import Picture, Reading, Span
from clipmill.video.geometry import Geometry
from clipmill.video.probe import VideoInfo

__all__ = ["span_seconds", "whole_frames"]

_ROUNDING_SECONDS = 0.001
"""Tolerance for times that containers, and often tables of spans, round to milliseconds."""


def span_seconds(info: VideoInfo, span: Span) -> float | None:
    """Duration in seconds of the part of a video inside a span; None if neither video nor span states an end."""
    start, end = span
    ends = [seconds for seconds in (end, info.duration_seconds) if seconds is not None]
    return min(ends) - max(start or 0.0, 0.0) if ends else None


def whole_frames(path: str | Path, info: VideoInfo, span: Span, reading: Reading) -> Iterator[Picture]:
    """Yields every undamaged frame of a video within a span once, in presentation order.

    Args:
        path: local file.
        info: its probe, which fixes stream and decoder.
        span: which frames; (None, None) means all.
        reading: statistics, updated on the way.

    Raises:
        VideoError: the file cannot be decoded at all.
    """
    if info.decoder == "pyav":
        pictures = read_pyav(path, info, span, reading)
    else:
        pictures = read_decord(path, info) if info.decoder == "decord" else read_pillow(path, info.geometry)
    start, end = span
    geometry: Geometry | None = None
    first_number = 0
    for picture in pictures:
        if start is not None and picture.seconds < start - _ROUNDING_SECONDS:
            first_number = picture.number + 1
            continue
        if end is not None and picture.seconds >= end - _ROUNDING_SECONDS:
            reading.is_past_span = True
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
