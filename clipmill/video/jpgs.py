"""Clips as JPEG files in one member: every frame on its own, of any size.

Layout, all integers ``<u4``: the number of frames T, the T lengths in bytes, then the T JPEG files back to back. The
bytes are a function of (frames, quality, library versions): libjpeg-turbo rounds alike with any vector instructions.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

__all__ = ["decode_jpgs", "encode_jpgs"]


def encode_jpgs(frames: np.ndarray, quality: int) -> bytes:
    """Encodes a clip.

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        quality: libjpeg's, 1 to 95; higher is better and larger.
    """
    files = []
    for frame in frames:
        file = io.BytesIO()
        # 4:4:4: frames of 64 pixels have no colour resolution to spare.
        Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0)
        files.append(file.getvalue())
    header = np.array([len(files), *map(len, files)], "<u4")
    return header.tobytes() + b"".join(files)


def decode_jpgs(data: bytes | memoryview) -> np.ndarray:
    """Decodes a clip of `encode_jpgs`.

    Returns:
        uint8 [T, H, W, 3], RGB.

    Raises:
        ValueError: the data was cut, or holds no JPEG files of one size.
    """
    view = memoryview(data)
    num_frames = int.from_bytes(view[:4], "little")
    start = 4 * (num_frames + 1)
    if not num_frames or len(view) < start:
        raise ValueError(f"no jpgs member: {len(view)} bytes for {num_frames} frames")
    lengths = np.frombuffer(view[4:start], "<u4").astype(np.int64)
    ends = (start + np.cumsum(lengths)).tolist()
    if ends[-1] != len(view):
        raise ValueError(f"the jpgs member declares {ends[-1]} bytes and holds {len(view)}")
    try:
        frames = [
            np.asarray(Image.open(io.BytesIO(view[end - length : end]), formats=["JPEG"]))
            for end, length in zip(ends, lengths.tolist(), strict=True)
        ]
    except OSError as error:  # Pillow's word for data that is no picture
        raise ValueError(f"the jpgs member holds a damaged JPEG file: {error}") from error
    return np.stack(frames)
