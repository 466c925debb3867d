"""Frames of a video, strictly in order. One resizer serves all decoders.

Shapes: a frame is uint8 [H, W, 3], RGB. Sizes are (height, width) in pixels.

The pixels of a data set must depend on the files alone, but decord's own resizer differs from swscale by up to 2.9 grey
levels. Frames of PyAV are therefore converted and resized in one step by swscale with fixed flags. decord delivers
full-size RGB only; with ``data.decoder=decord``, frames that PyAV has to read are converted to full-size RGB first too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter

from clipmill.video.decoders.picture import Reading, Span
from clipmill.video.decoders.whole import span_seconds, whole_frames
from clipmill.video.geometry import Fit, Resizer
from clipmill.video.probe import VideoInfo

__all__ = ["is_truncated", "read_frames"]


def read_frames(
    path: str | Path,
    info: VideoInfo,
    size: int | tuple[int, int],
    fit: Fit,
    *,
    whole: bool = False,
    rgb_first: bool = False,
    span: Span = (None, None),
    reading: Reading | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Reads every whole frame of a video once, in presentation order.

    Args:
        path: local file.
        info: its probe, which fixes stream and decoder.
        size: (height, width) of the frames; a number for a square.
        fit: ``crop`` covers the size and crops the centre. ``pad`` fits inside it and pads with black. ``stretch``
            ignores the shape of the frame.
        whole: only resize, without crop or pad: frames keep the aspect ratio of the video.
        rgb_first: convert to RGB before resizing, as decord always does. It takes longer and differs by some grey
            levels.
        span: read only the frames shown at or after the first time and before the second.
        reading: records what is found on the way, such as damage.

    Yields:
        (presentation time in seconds from the first frame of the file, uint8 [height, width, 3] RGB as a player shows
        it: upright, with square pixels).

    Raises:
        VideoError: the file cannot be decoded.
    """
    resize = Resizer((size, size) if isinstance(size, int) else size, fit, whole)
    to_rgb = VideoReformatter()
    for picture in whole_frames(path, info, span, Reading() if reading is None else reading):
        frame = to_rgb.reformat(picture.frame, format="rgb24", threads=1) if rgb_first else picture.frame
        yield picture.seconds, resize(frame, picture.geometry)


def is_truncated(
    info: VideoInfo, num_frames: int, first_seconds: float, last_seconds: float, span: Span = (None, None)
) -> bool:
    """Whether a video that was read to its end ended clearly before its declared end.

    Truncated AVI, Matroska and WebM files end without an error. Both the declared frame count and the declared duration
    must be missed: an edit list cuts frames that the index still counts, and the duration may be that of a longer audio
    stream. Durations are compared in seconds, because the average rate that a container states for a variable frame
    rate may be far off. The tolerance is 2 %.

    Args:
        info: the probe.
        num_frames: frames that were read.
        first_seconds: presentation time of the first of them.
        last_seconds: presentation time of the last.
        span: the span that was read; its duration then replaces the declared one.
    """
    duration = span_seconds(info, span)
    missed = []
    if info.container_frames is not None and span == (None, None):
        missed.append(num_frames < info.container_frames * 0.98 - 1)
    if duration is not None:
        covered = last_seconds - first_seconds + 1 / info.fps
        missed.append(covered < duration * 0.98 - 1 / info.fps)
    return bool(missed) and all(missed)
