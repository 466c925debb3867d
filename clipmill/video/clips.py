"""The clip rule: which frames of a video become clips. ``docs/formats.md`` states it.

Shapes: a frame is uint8 [H, W, 3], RGB; a clip is uint8 [T, H, W, 3].

One pass over the frames, in order, finds scenes, resamples to the frame rate, cuts clips and rejects some of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from clipmill.video.decoders.picture import Reading

__all__ = ["ClipCutter", "ClipFrames", "ClipRule"]

_SAME_TIME_SECONDS = 0.001
"""Tolerance for times that Matroska, WebM and FLV round to milliseconds. Without it, 30 frames per second sampled at 15
would give frames 0, 1, 4, 6, 8, ...
"""

_LONGEST_FRAME_SECONDS = 10.0
"""A longer gap between two frames is a break in the recording or in its clock, not a picture to repeat."""


class ClipRule(NamedTuple):
    """Which frames become a clip: `clipmill.config.ClipConfig` without its defaults."""

    num_frames: int
    frame_stride: int
    step: int
    max_clips: int | None = None
    fps: float | None = None
    scene_cut: float | None = None
    reject_static: float | None = None
    reject_black: float | None = None

    @property
    def span(self) -> int:
        """Frames that one clip covers. If ``fps`` is set, frames of the resampled video are counted."""
        return (self.num_frames - 1) * self.frame_stride + 1


@dataclass(frozen=True)
class ClipFrames:
    """A complete clip: its place in the video and its pixels, uint8 [T, H, W, 3].

    Attributes:
        ordinal: number of the clip among the video's clips that were not rejected.
        frame_numbers: numbers of its frames in the video, in presentation order. A number repeats if ``fps`` is above
            the video's own rate.
        frame_seconds: presentation time in the video of each of these frames.
        start_seconds: time from which its first frame is shown.
        end_seconds: time at which its last frame ends.
    """

    ordinal: int
    frame_numbers: tuple[int, ...]
    frame_seconds: tuple[float, ...]
    start_seconds: float
    end_seconds: float
    frames: np.ndarray


class _Frame(NamedTuple):
    number: int
    own_time: float
    """When the video shows the frame."""
    time: float
    """When the clip shows it; equals ``own_time`` unless the video is resampled."""
    pixels: np.ndarray
    begins_scene: bool


class ClipCutter:
    """Cuts one video into clips.

    Args:
        rule: the clip rule.
        fps: average frames per second of the video.

    Attributes:
        num_static: clips rejected because nothing moves in them.
        num_black: clips rejected because they are dark throughout.
        num_kept: clips delivered.
    """

    def __init__(self, rule: ClipRule, fps: float) -> None:
        self._rule, self._fps = rule, fps
        self.num_static = self.num_black = self.num_kept = 0

    def cut(self, frames: Iterable[tuple[float, np.ndarray]], reading: Reading | None = None) -> Iterator[ClipFrames]:
        """Yields the complete clips that start at frames 0, step, 2 * step, ... of each scene.

        Reading stops after ``rule.max_clips`` clips. Memory holds the frames of one clip span, so clips may overlap.

        Args:
            frames: (presentation time in seconds, pixels) of every frame, in presentation order.
            reading: gives the number of the current frame, and the frames at which scenes begin. None treats all frames
                as one scene.
        """
        rule = self._rule
        timeline = _scenes(frames, rule.scene_cut, reading)
        if rule.fps is not None:
            timeline = _resample(timeline, rule.fps, 1 / self._fps)
        recent: deque[_Frame] = deque(maxlen=rule.span)
        position = 0  # in the scene
        for frame in timeline:
            if frame.begins_scene:
                recent.clear()
                position = 0
            recent.append(frame)
            position += 1
            start = position - rule.span
            if start < 0 or start % rule.step:
                continue
            clip = self._clip(list(recent)[:: rule.frame_stride])
            if self._is_rejected(clip.frames):
                continue
            yield clip
            self.num_kept += 1
            if self.num_kept == rule.max_clips:
                return

    @property
    def is_short(self) -> bool:
        """Whether the video, or each of its scenes, was shorter than a clip."""
        return not (self.num_kept or self.num_static or self.num_black)

    def _clip(self, frames: list[_Frame]) -> ClipFrames:
        numbers, own_times, times, pixels, _ = zip(*frames, strict=True)
        return ClipFrames(
            ordinal=self.num_kept,
            frame_numbers=numbers,
            frame_seconds=own_times,
            start_seconds=times[0],
            end_seconds=times[-1] + 1 / (self._rule.fps or self._fps),
            frames=np.stack(pixels),
        )

    def _is_rejected(self, clip: np.ndarray) -> bool:
        rule = self._rule
        if rule.reject_black is not None and clip.mean(axis=(1, 2, 3)).max() < rule.reject_black:
            self.num_black += 1
            return True
        if rule.reject_static is not None and _motion(clip) < rule.reject_static:
            self.num_static += 1
            return True
        return False


def _scenes(
    frames: Iterable[tuple[float, np.ndarray]], scene_cut: float | None, reading: Reading | None
) -> Iterator[_Frame]:
    """Numbers the frames, and marks where a scene begins.

    A scene begins at the first frame, at the frames that ``reading`` lists, after a gap, and at a frame that differs
    from the one before by more than ``scene_cut``. Frames are compared at the video's own rate, where motion changes
    little between neighbours.
    """
    before: tuple[float, np.ndarray] | None = None
    for index, (time, pixels) in enumerate(frames):
        number = index if reading is None else reading.number
        begins = (
            before is None
            or (reading is not None and number in reading.scene_starts)
            or time - before[0] > _LONGEST_FRAME_SECONDS
            or (scene_cut is not None and _difference(before[1], pixels) > scene_cut)
        )
        yield _Frame(number, time, time, pixels, begins)
        before = time, pixels


def _resample(frames: Iterable[_Frame], fps: float, frame_seconds: float) -> Iterator[_Frame]:
    """Resamples to ``fps``: frame k of a scene is the frame that a player would show at the scene's start + k / fps.

    Args:
        frames: the frames of all scenes.
        fps: target frames per second.
        frame_seconds: how long the last frame of a scene is shown.
    """
    shown: _Frame | None = None
    start, tick = 0.0, 0

    def hold(until: float) -> Iterator[_Frame]:
        """Repeats ``shown`` for every tick that begins before ``until``."""
        nonlocal tick
        assert shown is not None
        while start + tick / fps < until - _SAME_TIME_SECONDS:
            yield shown._replace(time=start + tick / fps, begins_scene=tick == 0)
            tick += 1

    for frame in frames:
        if shown is not None:
            yield from hold(min(frame.time, shown.time + frame_seconds) if frame.begins_scene else frame.time)
        if frame.begins_scene:
            start, tick = frame.time, 0
        shown = frame
    if shown is not None:
        yield from hold(shown.time + frame_seconds)


def _difference(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute difference of two frames in grey levels, 0 to 255."""
    return float(np.abs(before.astype(np.int16) - after).mean())


def _motion(clip: np.ndarray) -> float:
    """Mean absolute difference between consecutive frames in grey levels; infinite for a single frame."""
    return float(np.mean([_difference(*pair) for pair in pairwise(clip)])) if len(clip) > 1 else np.inf
