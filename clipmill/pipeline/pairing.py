"""Assigns rows of actions to the frames of a clip: by number, or by time if the rows have times."""

from __future__ import annotations

import numpy as np

from clipmill.pipeline.fetch import ExcludedVideo, LocalVideo
from clipmill.video import Clip

__all__ = ["rows_of"]

_ROUNDING_SECONDS = 0.001
"""Tolerance: containers round times to milliseconds."""


def rows_of(clip: Clip, video: LocalVideo, start_seconds: float) -> np.ndarray:
    """The actions of a clip's frames.

    If the rows have times, a frame takes the nearest row, which must lie within half of the rows' period.
    No row may hold NaN or an infinity, which would ruin the loss of its batch.

    Args:
        clip: a clip of the video.
        video: a video with actions; without times, one row per frame.
        start_seconds: time in the file at which the video begins.

    Returns:
        float32 [num_frames, ...].

    Raises:
        ExcludedVideo: a frame has no row, or one that is not finite.
    """
    assert video.actions is not None
    numbers = clip.frame_numbers if video.action_seconds is None else _nearest_rows(clip, video, start_seconds)
    rows = video.actions[np.array(numbers)]
    if not np.isfinite(rows).all():
        bad = clip.frame_numbers[int(np.argmin(np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)))]
        raise ExcludedVideo("actions", f"the actions of frame {bad} hold a value that is not finite as float32")
    return rows


def _nearest_rows(clip: Clip, video: LocalVideo, start_seconds: float) -> np.ndarray:
    """Numbers of the rows that are nearest in time to a clip's frames."""
    assert video.actions is not None
    assert video.action_seconds is not None
    if not len(video.actions):
        raise ExcludedVideo("actions", "the video has no row of actions")
    order = np.argsort(video.action_seconds, kind="stable")
    row_seconds = video.action_seconds[order]
    seconds = np.array(clip.frame_seconds) - start_seconds
    after = np.searchsorted(row_seconds, seconds).clip(1, max(len(row_seconds) - 1, 1))
    candidates = np.stack([after - 1, np.minimum(after, len(row_seconds) - 1)])
    distances = np.abs(row_seconds[candidates] - seconds)
    nearest = candidates[distances.argmin(axis=0), np.arange(len(seconds))]
    period = np.median(np.diff(row_seconds)) if len(row_seconds) > 1 else 0.0
    worst = distances.min(axis=0).argmax()
    if distances.min(axis=0)[worst] > period / 2 + _ROUNDING_SECONDS:
        raise ExcludedVideo(
            "actions",
            f"no row of actions within half a period ({period / 2:.3f} s) of the frame at {seconds[worst]:.3f} s; the "
            f"{len(row_seconds)} rows go from {row_seconds[0]:.3f} to {row_seconds[-1]:.3f} s",
        )
    return order[nearest]
