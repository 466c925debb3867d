"""Bounds on duration, size and frame rate; videos outside them give no clips."""

from __future__ import annotations

from typing import NamedTuple

from clipmill.video.probe import VideoInfo

__all__ = ["VideoFilter"]


class VideoFilter(NamedTuple):
    """Inclusive bounds for a video; None sets no bound. Sizes are those that a player shows."""

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_height: int | None = None
    min_width: int | None = None
    min_fps: float | None = None
    max_fps: float | None = None

    def refuses(self, info: VideoInfo, seconds: float | None) -> str | None:
        """The name of the first bound that a video violates; None if it violates none.

        Args:
            info: the video's probe.
            seconds: the video's duration; None if it is not known yet.
        """
        height, width = info.geometry.shown_size
        for name, bound in self._asdict().items():
            kind, _, what = name.partition("_")
            value = {"seconds": seconds, "height": round(height), "width": round(width), "fps": info.fps}[what]
            if bound is None or value is None:
                continue
            if value < bound if kind == "min" else value > bound:
                return name
        return None
