"""A cheap look at a video file: what it is, and which decoder is right for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["VideoError", "VideoInfo", "probe"]


class VideoError(Exception):
    """The video cannot be read: the message says why in one line."""


@dataclass(frozen=True)
class VideoInfo:
    """What the container says about a video, before any frame is decoded."""

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


def probe(path: str | Path, decoder: Literal["auto", "decord", "pyav"] = "auto") -> VideoInfo:
    """Raises VideoError."""
    raise NotImplementedError
