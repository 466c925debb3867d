"""What the decoders deliver, and what they find on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clipmill.video.geometry import Geometry

__all__ = ["Picture", "Reading", "Span"]

Span = tuple[float | None, float | None]
"""The frames that are shown from the first time on and before the second, in seconds from the file's first frame."""


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
        is_past_span: a frame behind the span was seen, so nothing of the span is missing at its end.
        cause: of the first damage, in one line; None without damage.
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
