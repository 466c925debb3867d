"""Which videos are taken at all: by duration, size and frame rate."""

from __future__ import annotations

from typing import NamedTuple

from clipmill.video.probe import VideoInfo

__all__ = ["VideoFilter"]


class VideoFilter(NamedTuple):
    """Bounds that a video must keep, each included; None sets no bound. Sizes are those that a player shows."""

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_height: int | None = None
    min_width: int | None = None
    min_fps: float | None = None
    max_fps: float | None = None

    def refuses(self, info: VideoInfo, seconds: float | None) -> str | None:
        """The name of the first bound that a video breaks.

        Args:
            info: its probe.
            seconds: its duration; None where it is not known yet.
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
