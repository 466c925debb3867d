"""What became of the clips: each is decoded, its marks are read, its pixels are compared with the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import av
import numpy as np

from killing.footage import CLIP_FRAMES, SIDE, Footage, decode, read_mark

__all__ = ["Verdict", "judge"]

TOLERANCE = 12.0
"""Grey levels that a frame may differ from the reference, mean absolute difference; codecs at their defaults stay below
8, and a frame of another place or another video differs by more than 30."""


@dataclass(frozen=True)
class Verdict:
    """Numbers of clips.

    Attributes:
        right: of intact videos, each counted once.
        lost: of intact videos, missing.
        doubled: copies beyond the first one.
        wrong: other than 16 consecutive frames of one video, in place and alike.
        of_damaged: right ones that a tool saved from damaged videos; no duty, no fault.
    """

    right: int
    lost: int
    doubled: int
    wrong: int
    of_damaged: int


def judge(clips: Iterable[bytes], footage: Footage) -> Verdict:
    """Counts what is wrong with the clips of a tool, each the bytes of a video file."""
    found: Counter[tuple[int, int]] = Counter()
    num_wrong = 0
    for data in clips:
        place = _place(data, footage)
        if place is None:
            num_wrong += 1
        else:
            found[place] += 1
    expected = footage.expected()
    return Verdict(
        right=len(expected & found.keys()),
        lost=len(expected - found.keys()),
        doubled=found.total() - len(found),
        wrong=num_wrong,
        of_damaged=len(found.keys() - expected),
    )


def _place(data: bytes, footage: Footage) -> tuple[int, int] | None:
    """(video, first frame) of a clip that is right, else None."""
    try:
        frames = decode(data)
    except (av.FFmpegError, ValueError, IndexError):
        return None
    marks = [read_mark(frame) for frame in frames]
    if len(frames) != CLIP_FRAMES or marks[0] is None or marks[0][1] % CLIP_FRAMES:
        return None
    video, first = marks[0]
    if marks != [(video, first + number) for number in range(CLIP_FRAMES)] or video >= len(footage.num_clips_of):
        return None
    reference = footage.frames(video)[first : first + CLIP_FRAMES]
    if reference.shape != (CLIP_FRAMES, SIDE, SIDE, 3):
        return None
    difference = np.abs(frames.astype(np.int16) - reference).mean(axis=(1, 2, 3))
    return (video, first) if difference.max() <= TOLERANCE else None
