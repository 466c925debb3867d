"""Clips as pictures for people: contact sheets, and rows of playing clips for a web page.

Shapes: clips are uint8 [N, T, H, W, 3], RGB.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np

from clipmill.video.encode import encode_mp4

__all__ = ["contact_sheet", "playing_grid", "playing_row", "png_bytes"]

_WHITE = 255
_SHEET_COLUMNS = 8
"""The most frames that a contact sheet shows per clip."""
_SHEET_GAP_PIXELS = 2
_ROW_CRF = 12


def png_bytes(picture: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] as a PNG file (lossless, reproducible)."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame.pts = 0
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt = frame.width, frame.height, "rgb24"
    context.time_base = Fraction(1)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def contact_sheet(clips: np.ndarray) -> bytes:
    """A PNG file of clips uint8 [N, T, H, W, 3]: a row is a clip, its frames run left to right.

    Long clips show evenly spaced frames, including the first and the last.
    """
    num_frames = clips.shape[1]
    columns = np.linspace(0, num_frames - 1, min(num_frames, _SHEET_COLUMNS)).round().astype(int)
    rows = [_beside(list(clip), _SHEET_GAP_PIXELS, axis=1) for clip in clips[:, columns]]
    return png_bytes(_beside(rows, _SHEET_GAP_PIXELS, axis=0))


def playing_row(clips: np.ndarray, *, fps: float, scale: int, gap: int) -> bytes:
    """An mp4 file that plays clips side by side, for the ``<video>`` element of a page; see `playing_grid`."""
    return playing_grid(clips, fps=fps, scale=scale, gap=gap, columns=len(clips))


def playing_grid(clips: np.ndarray, *, fps: float, scale: int, gap: int, columns: int) -> bytes:
    """An mp4 file that plays clips in rows. Empty places in the last row are white.

    Args:
        clips: uint8 [N, T, H, W, 3].
        fps: frames per second.
        scale: enlargement, by whole pixels.
        gap: white pixels between the clips.
        columns: clips in a row.
    """
    missing = -len(clips) % columns
    clips = np.pad(clips, ((0, missing), *((0, 0) for _ in clips.shape[1:])), constant_values=_WHITE)
    large = list(_enlarge(clips, scale))
    rows = [_beside(large[start : start + columns], gap, axis=2) for start in range(0, len(large), columns)]
    grid = _beside(rows, gap, axis=1)
    height, width = grid.shape[1:3]
    # h264 in yuv420p needs even sizes.
    grid = np.pad(grid, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=_WHITE)
    return encode_mp4(grid, fps, _ROW_CRF)


def _enlarge(clips: np.ndarray, scale: int) -> np.ndarray:
    """[N, T, H, W, 3] -> [N, T, H * scale, W * scale, 3], nearest neighbour: no pixel is invented."""
    return clips.repeat(scale, axis=2).repeat(scale, axis=3)


def _beside(pictures: list[np.ndarray], gap: int, axis: int) -> np.ndarray:
    """Joins equal arrays along ``axis`` with white gaps between them."""
    shape = list(pictures[0].shape)
    shape[axis] = gap
    white = np.full(shape, _WHITE, np.uint8)
    parts = [part for picture in pictures for part in (white, picture)][1:]
    return np.concatenate(parts, axis=axis)
