"""The clips that came back worst and best, and a picture of them: where a tokenizer fails has to be seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from clipmill.evaluation.gallery import Gallery
from clipmill.video.pictures import png_bytes

__all__ = ["extremes_picture"]

_COLUMN_PIXELS = 512
"""About as wide are the frames of one clip beside each other."""
_MOST_FRAMES, _FEWEST_FRAMES = 8, 2
_LINE_PIXELS = 20
_GAP_PIXELS, _FRAME_GAP_PIXELS = 8, 2


def extremes_picture(extremes: dict[str, Any], gallery: Gallery) -> bytes:
    """A PNG file: the worst clips on the left, the best on the right, real frames above their reconstructions.

    Args:
        extremes: section ``extremes`` of ``metrics.json``.
        gallery: that holds these clips.
    """
    columns = [
        np.concatenate([_captioned(f"{name} {rank}", clip, gallery) for rank, clip in enumerate(extremes[name], 1)])
        for name in ("worst", "best")
    ]
    gap = np.full((len(columns[0]), 3 * _GAP_PIXELS, 3), 255, np.uint8)
    return png_bytes(np.concatenate([columns[0], gap, columns[1]], axis=1))


def _captioned(name: str, clip: dict[str, Any], gallery: Gallery) -> NDArray[np.uint8]:
    """Caption, real frames and reconstructed frames, one below the other: uint8 [height, width, 3]."""
    row = gallery.keys.index(clip["key"])
    real, reconstruction = gallery.real[row], gallery.reconstruction[row]
    num_frames, width = len(real), real.shape[2]
    num_shown = min(num_frames, max(_FEWEST_FRAMES, min(_MOST_FRAMES, _COLUMN_PIXELS // width)))
    shown = np.linspace(0, num_frames - 1, num_shown).round().astype(int)
    scale = max(1, _COLUMN_PIXELS // (num_shown * width))  # by whole pixels: none is invented
    gap = ((0, 0), (0, _FRAME_GAP_PIXELS), (0, _FRAME_GAP_PIXELS), (0, 0))  # white, below and right of each frame
    rows = [
        np.concatenate(list(np.pad(frames, gap, constant_values=255)), axis=1)
        for frames in (video[shown].repeat(scale, axis=1).repeat(scale, axis=2) for video in (real, reconstruction))
    ]
    line = Image.new("RGB", (rows[0].shape[1], _LINE_PIXELS), "white")
    decibels = clip["psnr_db"]
    quality = "without error" if decibels is None else f"PSNR {decibels:.2f} dB"
    text = f"{name}   {quality}   {clip['key']}"
    ImageDraw.Draw(line).text((0, 4), text, fill="black", font=ImageFont.load_default(size=12))
    below = np.full((_GAP_PIXELS, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([np.asarray(line), *rows, below])
