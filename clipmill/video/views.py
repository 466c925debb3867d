"""Views of a clip: random crops, half of them mirrored, each a function of a key and nothing else."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

__all__ = ["View", "draw_view", "roomy", "take_view"]


class View(NamedTuple):
    """A square of a clip's frames.

    Attributes:
        top: first row of the square.
        left: first column.
        height: of the frames that it was cut from.
        width: of these frames.
        flipped: mirrored left to right.
    """

    top: int
    left: int
    height: int
    width: int
    flipped: bool


def roomy(resolution: int) -> int:
    """Shorter side, in pixels, of the frames that views are cut from: an eighth of it is room to move (256 for 224)."""
    return round(resolution * 8 / 7)


def draw_view(key: str, height: int, width: int, resolution: int, *, may_flip: bool) -> View:
    """The view of a key: its place is uniform over all places, and one of two is mirrored."""
    draws = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=24).digest(), "<u8").tolist()
    return View(
        top=draws[0] % (height - resolution + 1),
        left=draws[1] % (width - resolution + 1),
        height=height,
        width=width,
        flipped=may_flip and bool(draws[2] % 2),
    )


def take_view(clip: np.ndarray, view: View, resolution: int) -> np.ndarray:
    """uint8 [T, height, width, 3] -> [T, resolution, resolution, 3], contiguous."""
    square = clip[:, view.top : view.top + resolution, view.left : view.left + resolution]
    return np.ascontiguousarray(square[:, :, ::-1] if view.flipped else square)
