"""Combines clips into a single video for a page, so that they always play in sync."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipmill.video.pictures import playing_grid

__all__ = ["USUAL_FPS", "Film", "Row"]

USUAL_FPS = 8.0
"""Frames per second of clips that do not state a rate."""
_SHOWN_PIXELS = 128
"""Smaller clips are enlarged by a whole factor, because h264 halves the resolution of colour."""
_GAP_PIXELS = 6
"""Gap between clips, in pixels of the film."""


@dataclass(frozen=True)
class Row:
    """Clips side by side."""

    kind: str
    """Kind of the clips: real, reconstruction, sample, or the name of an evaluation."""
    clips: Sequence[NDArray[np.uint8]]
    """[T, H, W, 3] each."""
    rates: Sequence[float]
    """Frames per second at which each plays."""
    titles: Sequence[str]
    """Title of each clip."""
    num_given: int = 0
    """Number of first frames that were given, not generated."""


@dataclass(frozen=True)
class Film:
    """A grid of playing clips, each at its own rate.

    The gaps are white in the video. The page covers them with its own colour, and needs all sizes for that.
    """

    name: str
    rows: tuple[Row, ...]
    fps: float
    """Frames per second of the film: the highest rate of its clips. Clips with a lower rate repeat frames."""
    num_frames: int
    """Duration of the longest clip. Shorter clips stay at their last frame."""
    clip_size: tuple[int, int]
    """Width and height of a clip in pixels of the film."""
    size: tuple[int, int]
    """Width and height of the film."""
    data: bytes
    """The h264 file."""

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> Film | None:
        """Lays clips out and encodes them; None without any.

        Args:
            name: of the film, for its file.
            rows: from top to bottom; a row without clips is skipped.
        """
        rows = tuple(row for row in rows if len(row.clips))
        if not rows:
            return None
        fps = max(max(row.rates) for row in rows)
        timed = [(clip, rate) for row in rows for clip, rate in zip(row.clips, row.rates, strict=True)]
        num_frames = max(math.ceil(len(clip) / rate * fps - 1e-6) for clip, rate in timed)
        height, width = rows[0].clips[0].shape[1:3]
        columns = max(len(row.clips) for row in rows)
        grid = np.full((len(rows) * columns, num_frames, height, width, 3), 255, np.uint8)
        for number, row in enumerate(rows):
            for column, (clip, rate) in enumerate(zip(row.clips, row.rates, strict=True)):
                times = np.arange(num_frames) / fps
                grid[number * columns + column] = clip[np.minimum((times * rate + 1e-6).astype(int), len(clip) - 1)]
        scale = max(1, -(-_SHOWN_PIXELS // min(height, width)))
        clip_size = (width * scale, height * scale)
        size = tuple(
            number * (pixels + _GAP_PIXELS) - _GAP_PIXELS
            for number, pixels in zip((columns, len(rows)), clip_size, strict=True)
        )
        data = playing_grid(grid, fps=fps, scale=scale, gap=_GAP_PIXELS, columns=columns)
        return cls(name, rows, fps, num_frames, clip_size, (size[0] + size[0] % 2, size[1] + size[1] % 2), data)

    @property
    def num_columns(self) -> int:
        """Clips in the longest row."""
        return max(len(row.clips) for row in self.rows)

    @property
    def download_name(self) -> str:
        """Name of a downloaded file."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name) + ".mp4"

    @property
    def file_name(self) -> str:
        """A name derived from the content."""
        return f"{hashlib.sha256(self.data).hexdigest()[:16]}.mp4"

    def given_film_frames(self, row: Row) -> int:
        """Frames of the film during which a row shows given frames."""
        return math.ceil(row.num_given / row.rates[0] * self.fps - 1e-6) if row.num_given else 0

    def shares(self, axis: int) -> tuple[float, float]:
        """Percent of the film's width (axis 0) or height (axis 1) that one clip takes, and that one gap takes."""
        count = (self.num_columns, len(self.rows))[axis]
        clip = 100 * self.clip_size[axis] / self.size[axis]
        return clip, (100 - count * clip) / max(1, count - 1)
