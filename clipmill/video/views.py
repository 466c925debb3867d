"""Views of a clip: random crops, half of them mirrored. Each is a function of its key alone."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

__all__ = ["View", "draw_view", "take_view", "view_frame_size"]


class View(NamedTuple):
    """A crop of a clip's frames that has the size of a clip.

    Attributes:
        top: first row of the crop.
        left: first column of the crop.
        height: height of the frames that it was cut from, in pixels.
        width: width of these frames, in pixels.
        flipped: whether it is mirrored left to right.
    """

    top: int
    left: int
    height: int
    width: int
    flipped: bool


def view_frame_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the frames that views of ``size`` are cut from: 8/7 of it, as 256 for 224."""
    height, width = (round(side * 8 / 7) for side in size)
    return height, width


def draw_view(key: str, height: int, width: int, size: tuple[int, int], *, may_flip: bool) -> View:
    """The view of a key in frames of ``height`` x ``width``: all positions are equally likely, half are mirrored."""
    draws = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=24).digest(), "<u8").tolist()
    return View(
        top=draws[0] % (height - size[0] + 1),
        left=draws[1] % (width - size[1] + 1),
        height=height,
        width=width,
        flipped=may_flip and bool(draws[2] % 2),
    )


def take_view(clip: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """uint8 [T, view.height, view.width, 3] -> [T, *size, 3], contiguous."""
    part = clip[:, view.top : view.top + size[0], view.left : view.left + size[1]]
    return np.ascontiguousarray(part[:, :, ::-1] if view.flipped else part)
