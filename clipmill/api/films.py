"""Writes videos to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from clipmill import storage
from clipmill.api.arrays import as_videos
from clipmill.errors import UserError
from clipmill.sampling.preview import film
from clipmill.sampling.settings import CRF, USUAL_FPS
from clipmill.video import encode_mp4

__all__ = ["write_video"]


def write_video(url: str | Path, video: np.ndarray | Tensor, fps: float = USUAL_FPS) -> None:
    """Writes an h264 mp4 file.

    Args:
        url: path or bucket URL, which should end in ``.mp4``.
        video: uint8 [T, H, W, 3], written unchanged; or [B, T, H, W, 3], tiled in a grid, small videos enlarged.
        fps: frames per second.

    Raises:
        UserError: the array has another dtype or shape, or a single video has an odd height or width.
    """
    videos, is_single = as_videos(video)
    height, width = videos.shape[2:4]
    if is_single and (height % 2 or width % 2):
        raise UserError(f"h264 needs an even height and width, not {height} x {width}; pad the video by one pixel")
    pixels = videos.numpy()
    data = encode_mp4(pixels[0], fps, CRF) if is_single else film(pixels, fps)
    storage.publish_bytes(storage.absolute(str(url)), data)
