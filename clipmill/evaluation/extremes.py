"""The clips that came back worst and best, and a picture of them: where a tokenizer fails has to be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from clipmill.evaluation.scores import psnr_db
from clipmill.video.pictures import png_bytes

__all__ = ["Extremes"]

MOST_SHOWN = 4
"""At either end."""
_COLUMN_PIXELS = 512
"""About as wide are the frames of one clip beside each other."""
_MOST_FRAMES, _FEWEST_FRAMES = 8, 2
_LINE_PIXELS = 20
_GAP_PIXELS, _FRAME_GAP_PIXELS = 8, 2


@dataclass(frozen=True)
class _Scored:
    mse: float
    key: str
    real: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]


class Extremes:
    """Keeps the clips with the largest and the smallest mean square error of all that pass by."""

    def __init__(self) -> None:
        self._by_error: list[_Scored] = []
        """Ascending; at most twice `MOST_SHOWN`."""

    def update(
        self, keys: list[str], real: NDArray[np.uint8], reconstruction: NDArray[np.uint8], mse: NDArray[np.float64]
    ) -> None:
        """Adds clips.

        Args:
            keys: of the B clips.
            real: uint8 [B, T, H, W, 3].
            reconstruction: uint8 [B, T, H, W, 3].
            mse: float64 [B], in units of [0, 1].
        """
        found = [  # copies: a kept row would keep its whole batch
            _Scored(error, key, *(clip.copy() for clip in pair))
            for error, key, *pair in zip(mse.tolist(), keys, real, reconstruction, strict=True)
        ]
        ranked = sorted([*self._by_error, *found], key=lambda clip: clip.mse)
        if len(ranked) > 2 * MOST_SHOWN:
            ranked[MOST_SHOWN:-MOST_SHOWN] = []
        self._by_error = ranked

    @property
    def worst(self) -> list[_Scored]:
        """The worst first; of few clips at most half, rounded up."""
        return self._by_error[::-1][: -(-len(self._by_error) // 2)]

    @property
    def best(self) -> list[_Scored]:
        """The best first; as many as of the worst."""
        return self._by_error[: len(self.worst)]

    def result(self) -> dict[str, Any]:
        """Keys and PSNR of ``worst`` and ``best``, as plain JSON values."""
        return {
            name: [{"key": clip.key, "psnr_db": psnr_db(clip.mse)} for clip in clips]
            for name, clips in (("worst", self.worst), ("best", self.best))
        }

    def picture(self) -> bytes:
        """A PNG file: the worst clips on the left, the best on the right, real frames above their reconstructions."""
        columns = [
            np.concatenate([_captioned(f"{name} {rank}", clip) for rank, clip in enumerate(clips, 1)])
            for name, clips in (("worst", self.worst), ("best", self.best))
        ]
        gap = np.full((len(columns[0]), 3 * _GAP_PIXELS, 3), 255, np.uint8)
        return png_bytes(np.concatenate([columns[0], gap, columns[1]], axis=1))


def _captioned(name: str, clip: _Scored) -> NDArray[np.uint8]:
    """Caption, real frames and reconstructed frames, one below the other: uint8 [height, width, 3]."""
    num_frames, width = len(clip.real), clip.real.shape[2]
    num_shown = min(num_frames, max(_FEWEST_FRAMES, min(_MOST_FRAMES, _COLUMN_PIXELS // width)))
    shown = np.linspace(0, num_frames - 1, num_shown).round().astype(int)
    scale = max(1, _COLUMN_PIXELS // (num_shown * width))  # by whole pixels: none is invented
    gap = ((0, 0), (0, _FRAME_GAP_PIXELS), (0, _FRAME_GAP_PIXELS), (0, 0))  # white, below and right of each frame
    rows = [
        np.concatenate(list(np.pad(frames, gap, constant_values=255)), axis=1)
        for frames in (
            video[shown].repeat(scale, axis=1).repeat(scale, axis=2) for video in (clip.real, clip.reconstruction)
        )
    ]
    line = Image.new("RGB", (rows[0].shape[1], _LINE_PIXELS), "white")
    decibels = psnr_db(clip.mse)
    quality = "without error" if decibels is None else f"PSNR {decibels:.2f} dB"
    text = f"{name}   {quality}   {clip.key}"
    ImageDraw.Draw(line).text((0, 4), text, fill="black", font=ImageFont.load_default(size=12))
    below = np.full((_GAP_PIXELS, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([np.asarray(line), *rows, below])
