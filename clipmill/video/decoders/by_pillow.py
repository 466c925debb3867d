"""Animated WebP and PNG, and still pictures, by Pillow. FFmpeg cannot read animated WebP and drops PNG transparency.

Transparent pixels are shown over white, as on most web pages and as FFmpeg does for GIF. Delays are interpreted as in
browsers: 10 ms or less means 100 ms (Chromium and Firefox, for all three formats).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image, ImageOps

from clipmill.video.decoders.picture import Picture
from clipmill.video.errors import VideoError, as_video_error
from clipmill.video.geometry import Geometry

__all__ = ["AnimationInfo", "is_animation", "read_animation", "read_pillow", "read_still"]

_STILL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_SHORTEST_DELAY_MS, _USUAL_DELAY_MS = 10, 100


@dataclass(frozen=True)
class AnimationInfo:
    """Properties of an animated picture.

    Attributes:
        format: format of the file.
        width: width in pixels.
        height: height in pixels.
        num_frames: frames of one loop.
        has_alpha: whether some frame may be transparent.
    """

    format: Literal["webp", "png"]
    width: int
    height: int
    num_frames: int
    has_alpha: bool


def is_animation(path: str | Path) -> bool:
    """Whether the first bytes of a local file are those of WebP or PNG, animated or not."""
    with open(path, "rb") as file:
        head = file.read(12)
    return head.startswith(b"\x89PNG\r\n\x1a\n") or (head.startswith(b"RIFF") and head.endswith(b"WEBP"))


def read_animation(path: str | Path) -> tuple[Iterator[tuple[float, np.ndarray]], AnimationInfo]:
    """Reads one loop of an animated WebP or PNG file.

    Args:
        path: local file.

    Returns:
        An iterator of (seconds from the first frame, uint8 [H, W, 3] RGB), which reads frames on demand; and the file's
        properties.

    Raises:
        VideoError: the file is not animated WebP or PNG, or is damaged. The iterator may raise it too.
        OSError: the file is missing, or the disk failed.
    """
    with as_video_error("cannot open", path):
        image: Any = Image.open(path, formats=("WEBP", "PNG"))
        # The picture for viewers without animation may not be part of the animation.
        first = int(getattr(image, "default_image", False))
        info = AnimationInfo(
            format="webp" if image.format == "WEBP" else "png",
            width=image.width,
            height=image.height,
            num_frames=image.n_frames - first,
            has_alpha=image.has_transparency_data,
        )
        if not image.is_animated:
            raise VideoError("a still picture")
    return _frames(path, image, first), info


def _frames(path: str | Path, image: Any, first: int) -> Iterator[tuple[float, np.ndarray]]:
    elapsed_ms = 0.0
    for number in range(first, image.n_frames):
        with as_video_error("cannot decode", path):
            image.seek(number)
            image.load()
            pixels = _over_white(image)
        yield elapsed_ms / 1000, pixels
        delay_ms = image.info.get("duration", 0)
        elapsed_ms += delay_ms if delay_ms > _SHORTEST_DELAY_MS else _USUAL_DELAY_MS


def read_still(path: str | Path) -> np.ndarray:
    """A still picture, turned upright, uint8 [H, W, 3] RGB. An animation gives its first frame.

    Raises:
        VideoError: not a picture, damaged, or larger than Pillow's limit against decompression bombs.
        OSError: the file is missing, or the disk failed.
    """
    with as_video_error("no picture that can be read", path):
        image: Any = Image.open(path, formats=_STILL_FORMATS)
        image.load()
        return _over_white(ImageOps.exif_transpose(image))


def _over_white(image: Any) -> np.ndarray:
    """The picture over a white background, uint8 [H, W, 3]."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    rgba = image.convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def read_pillow(path: str | Path, geometry: Geometry) -> Iterator[Picture]:
    """All frames of an animated WebP or PNG."""
    frames, _ = read_animation(path)
    for number, (seconds, pixels) in enumerate(frames):
        yield Picture(number, av.VideoFrame.from_ndarray(pixels, format="rgb24"), seconds, geometry, False)
