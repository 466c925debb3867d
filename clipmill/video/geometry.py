"""Geometry of frames as a player shows them: square pixels, upright, resized and fitted to the size of a clip.

Shapes: a frame is uint8 [H, W, 3], RGB. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from av.sidedata import sidedata
from av.video.reformatter import Interpolation, VideoReformatter

__all__ = ["UPRIGHT", "Fit", "Geometry", "Orientation", "Resizer", "fitted_size", "orientation_of", "sample_aspect"]

Fit = Literal["crop", "pad", "stretch"]

# Area averaging avoids ringing in small frames and is the fastest. Without the full-chroma flags, swscale would halve
# the colour resolution of RGB. BITEXACT gives the same pixels on every CPU.
_RESIZE = (
    Interpolation.AREA
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
_WIDEST_PIXEL = 8.0
"""A sample aspect ratio above this, or below its inverse, comes from a damaged header: real ones are 0.4 to 3.6."""


class Orientation(NamedTuple):
    """One of the eight ways to turn and mirror a stored frame: first transpose, then flip.

    Attributes:
        transpose: rows become columns.
        flip_x: mirror left and right.
        flip_y: mirror top and bottom.
    """

    transpose: bool
    flip_x: bool
    flip_y: bool

    @property
    def mirrors(self) -> bool:
        """Whether the orientation mirrors. It then equals a left-right mirroring, followed by `rotation`."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    @property
    def rotation(self) -> int:
        """Rotation in degrees counter-clockwise, a multiple of 90."""
        return 90 * _TURNS[self.mirrors].index(self)

    @staticmethod
    def of(rotation: int, mirrored: bool) -> Orientation:
        """The orientation with an optional left-right mirroring, followed by a rotation of ``rotation`` degrees."""
        return _TURNS[mirrored][rotation // 90]

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Returns a view of [h, w, 3] in the orientation that a player shows."""
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)
        if self.flip_x:
            pixels = pixels[:, ::-1]
        return pixels[::-1] if self.flip_y else pixels


UPRIGHT = Orientation(False, False, False)

_TURNS = {
    False: [UPRIGHT, Orientation(True, False, True), Orientation(False, True, True), Orientation(True, True, False)],
    True: [
        Orientation(False, True, False),
        Orientation(True, False, False),
        Orientation(False, False, True),
        Orientation(True, True, True),
    ],
}
"""Orientations without (False) and with (True) a left-right mirroring, indexed by the quarter turns that follow it."""


class Geometry(NamedTuple):
    """Stored size, pixel shape and orientation of a frame. A change within a video begins a new scene.

    Attributes:
        width: stored width in pixels.
        height: stored height in pixels.
        sample_aspect: width of a pixel divided by its height.
        orientation: turns a stored frame into a shown one.
    """

    width: int
    height: int
    sample_aspect: float
    orientation: Orientation

    @property
    def shown_size(self) -> tuple[float, float]:
        """(height, width) in square pixels, upright."""
        height, width = self.height, self.width * self.sample_aspect
        return (width, height) if self.orientation.transpose else (height, width)


_sidedata: Any = sidedata


def _unknown_type(cls: Any, value: int) -> Any:
    member = object.__new__(cls)
    member._name_, member._value_ = f"TYPE_{value}", value
    return member


# If one side data of a frame has a type that PyAV has no name for (EXIF of MJPEG), PyAV refuses all of them.
_sidedata.Type._missing_ = classmethod(_unknown_type)


def orientation_of(frame: Any) -> Orientation:
    """The orientation that the display matrix of an `av.VideoFrame` asks for.

    Decoders attach to each frame its own matrix or that of the container. A matrix maps a stored point (x, y) to (a x +
    c y, b x + d y). Rotations that are not multiples of 90 degrees are rounded to one.
    """
    # frame.side_data would create a reference cycle, so that only the garbage collector could free the frame.
    side_data = _sidedata.SideDataContainer(frame)
    if not len(side_data):  # most frames have none
        return UPRIGHT
    matrix = side_data.get(_sidedata.Type.DISPLAYMATRIX)
    return UPRIGHT if matrix is None else _orientation(bytes(matrix))


@lru_cache
def _orientation(matrix: bytes) -> Orientation:
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def sample_aspect(stream: Any, stated_by_codec: Any) -> float:
    """Width of a pixel over its height, for the frame that a stream decoded last.

    As in ffplay, the container's ratio takes precedence. PyAV's ``stream.sample_aspect_ratio`` falls back to the
    codec's ratio; so if it differs from the codec's first ratio, it is the container's.

    Args:
        stream: PyAV's stream.
        stated_by_codec: the codec's ratio before any frame was decoded.
    """
    ratio = stream.sample_aspect_ratio
    if not ratio or ratio == stated_by_codec:
        ratio = stream.codec_context.sample_aspect_ratio or ratio
    if not ratio:
        return 1.0
    aspect: float = ratio.numerator / ratio.denominator  # comparing a Fraction with a float takes microseconds
    return aspect if 1 / _WIDEST_PIXEL <= aspect <= _WIDEST_PIXEL else 1.0


class Resizer:
    """Turns decoded frames into upright RGB frames of one size.

    Args:
        size: (height, width) of a clip.
        fit: how a frame of another shape is fitted; see `fitted_size`.
        whole: only resize, without crop or pad: frames keep the aspect ratio of the video.
    """

    def __init__(self, size: tuple[int, int], fit: Fit, whole: bool):
        self._size, self._fit, self._whole = size, fit, whole
        self._reformatter = VideoReformatter()
        self._geometry: Geometry | None = None  # the geometry that the following fields were computed for
        self._resized = size
        self._crop: tuple[slice, slice] | None = None

    def __call__(self, frame: Any, geometry: Geometry) -> np.ndarray:
        """`av.VideoFrame` -> uint8 [height, width, 3]; with ``whole``, of the size that `fitted_size` gives."""
        if geometry != self._geometry:
            self._adapt(geometry)
        height, width = self._resized
        # If the size is right already, the pixels stay unchanged.
        resized = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=_RESIZE, threads=1
        )
        plane: Any = resized.planes[0]
        # A view of the frame's own memory: `to_ndarray` costs 1 % of decoding a small video.
        pixels = np.ndarray((height, width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        if geometry.orientation != UPRIGHT:
            pixels = geometry.orientation.apply(pixels)
        if self._crop is None:
            return pixels
        if self._fit == "pad":
            padded = np.zeros((*self._size, 3), np.uint8)
            padded[self._crop] = pixels
            return padded
        return pixels[self._crop]

    def _adapt(self, geometry: Geometry) -> None:
        """Computes the sizes for frames of another geometry."""
        fitted = fitted_size(geometry.shown_size, self._size, self._fit)
        # resize before turning: there are fewer pixels to turn
        self._resized = fitted[::-1] if geometry.orientation.transpose else fitted
        self._geometry, self._crop = geometry, None
        if fitted != self._size and not self._whole:
            rows, columns = (
                slice(abs(wanted - side) // 2, abs(wanted - side) // 2 + min(wanted, side))
                for wanted, side in zip(self._size, fitted, strict=True)
            )
            self._crop = rows, columns


def fitted_size(shown: tuple[float, float], size: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """(height, width) to which a frame is resized before crop or pad.

    Args:
        shown: (height, width) of the frame in square pixels.
        size: (height, width) of a clip.
        fit: ``crop`` covers the clip, ``pad`` fits inside it, ``stretch`` ignores the shape of the frame.
    """
    if fit == "stretch":
        return size
    scales = [clip / frame for clip, frame in zip(size, shown, strict=True)]
    scale = max(scales) if fit == "crop" else min(scales)
    height, width = (max(1, round(side * scale)) for side in shown)
    return height, width
