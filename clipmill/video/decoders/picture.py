"""The frames that decoders deliver, and the statistics they collect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clipmill.video.geometry import Geometry

__all__ = ["Picture", "Reading", "Span"]

Span = tuple[float | None, float | None]
"""(start, end) in seconds from the file's first frame: frames shown from start until before end; None sets no limit."""


@dataclass
class Reading:
    """Statistics of reading a video, updated while frames are read.

    Attributes:
        num_frames: undamaged frames that were delivered.
        number: number of the newest delivered frame among all frames of the video or span, damaged ones included, from
            0.
        damaged_frames: frames that were dropped: damaged, or before a key frame.
        joins: places where the clock restarts because recordings were joined.
        scene_starts: numbers of the frames at which a new scene begins: after damage, at a join, or where size or
            orientation change.
        first_seconds: time of the first delivered frame.
        last_seconds: time of the last delivered frame.
        is_past_span: whether a frame after the span was seen, so that the end of the span is complete.
        cause: reason of the first damage in one line; None without damage.
    """

    num_frames: int = 0
    number: int = -1
    damaged_frames: int = 0
    joins: int = 0
    scene_starts: set[int] = field(default_factory=set)
    first_seconds: float = 0.0
    last_seconds: float = 0.0
    is_past_span: bool = False
    cause: str | None = None


class Picture(NamedTuple):
    """One undamaged frame.

    Attributes:
        number: number among all decoded frames, from 0; lost frames are counted too.
        frame: the stored `av.VideoFrame`.
        seconds: presentation time from the first frame of the file.
        geometry: how it is shown.
        begins_scene: whether it starts a new scene.
    """

    number: int
    frame: Any
    seconds: float
    geometry: Geometry
    begins_scene: bool
