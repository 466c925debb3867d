"""The clips of one class as a single video for the report, so that what is compared cannot drift apart."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipmill.video.pictures import playing_row

__all__ = ["FRAMES_PER_SECOND", "Film"]

FRAMES_PER_SECOND = 8
"""Slow enough to compare moving rows by eye, whatever the footage ran at."""
_SHOWN_PIXELS = 128
"""Clips smaller than this are enlarged by whole pixels: h264 halves the resolution of colour."""
_GAP_PIXELS = 3
"""Between clips, before they are enlarged."""


@dataclass(frozen=True)
class Film:
    """A grid of playing clips: a row is a kind (real, sample), a column a clip.

    The gaps are white in the video; the page covers them in its own colour, which is why it gets all sizes.
    """

    label: str | None
    """The class."""
    kinds: tuple[str, ...]
    """What the rows show, from the top; a kind without any clip has no row."""
    missing: tuple[str, ...]
    """The kinds without any clip."""
    lengths: tuple[int, ...]
    """Clips in each row; the rest of a row is empty."""
    clip_size: tuple[int, int] = (0, 0)
    """Width and height of a clip in pixels of the video."""
    size: tuple[int, int] = (0, 0)
    """Width and height of the video."""
    uri: str = ""
    """The h264 file as a data URI; empty without any clip."""

    @property
    def num_columns(self) -> int:
        """Clips in the longest row."""
        return max(self.lengths)

    def shares(self, axis: int) -> tuple[float, float]:
        """Percent of the video's width (axis 0) or height (axis 1) that one clip takes, and that one gap takes."""
        count = (self.num_columns, len(self.kinds))[axis]
        clip = 100 * self.clip_size[axis] / self.size[axis]
        return clip, (100 - count * clip) / max(1, count - 1)

    @classmethod
    def of(cls, label: str | None, clips: Mapping[str, Sequence[NDArray[np.uint8]]]) -> Film:
        """Lays clips out and encodes them.

        Args:
            label: their class.
            clips: uint8 [T, H, W, 3] by kind, all of one size and at least as many frames as the first.
        """
        kinds = tuple(kind for kind in clips if len(clips[kind]))
        missing = tuple(kind for kind in clips if not len(clips[kind]))
        lengths = tuple(len(clips[kind]) for kind in kinds)
        if not kinds:
            return cls(label, kinds, missing, lengths)
        num_frames, height, width, _ = clips[kinds[0]][0].shape
        scale = max(1, -(-_SHOWN_PIXELS // min(height, width)))
        column_height = len(kinds) * (height + _GAP_PIXELS) - _GAP_PIXELS
        columns = np.full((max(lengths), num_frames, column_height, width, 3), 255, np.uint8)
        for row, kind in enumerate(kinds):
            top = row * (height + _GAP_PIXELS)
            for column, clip in enumerate(clips[kind]):
                columns[column, :, top : top + height] = clip[:num_frames]  # samples may be longer
        gap = _GAP_PIXELS * scale
        video = playing_row(columns, fps=FRAMES_PER_SECOND, scale=scale, gap=gap)
        return cls(
            label,
            kinds,
            missing,
            lengths,
            clip_size=(width * scale, height * scale),
            size=(len(columns) * (width * scale + gap) - gap, column_height * scale),
            uri=f"data:video/mp4;base64,{base64.b64encode(video).decode()}",
        )
