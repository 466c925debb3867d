"""Frames of a video, strictly in order, resized by one resizer whichever decoder reads them.

Shapes: a frame is uint8 [H, W, 3], RGB. Sizes are (height, width) in pixels.

Why one resizer: decord's own differs from swscale by up to 2.9 grey levels. The pixels of a data set are a function of
the files alone: PyAV's frames are converted and resized in one step by swscale with fixed flags. Where decord was asked
for, which gives full-size RGB only, the frames that PyAV has to read go through the same full-size RGB.
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
        whole: resize only, neither crop nor pad: frames keep the shape of the video.
        rgb_first: convert before resizing, as decord always does: costs time, and differs by some grey levels.
        span: read only the frames shown from the first time on and before the second.
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
    """Whether a video that was read to its end ended well before it should have.

    Truncated AVI, Matroska and WebM files end without an error. Both of the container's claims must be missed: an edit
    list cuts frames that the index still counts, and a duration may be that of a longer audio stream. Time is compared
    with time, since the average rate that a container states of a variable one may be far off. 2 % are forgiven.

    Args:
        info: the probe.
        num_frames: that were read.
        first_seconds: presentation time of the first of them.
        last_seconds: presentation time of the last.
        span: that was read; the duration that counts is then that of the span.
    """
    duration = span_seconds(info, span)
    missed = []
    if info.container_frames is not None and span == (None, None):
        missed.append(num_frames < info.container_frames * 0.98 - 1)
    if duration is not None:
        covered = last_seconds - first_seconds + 1 / info.fps
        missed.append(covered < duration * 0.98 - 1 / info.fps)
    return bool(missed) and all(missed)
