"""Clips as small h264 mp4 files, and back."""

from __future__ import annotations

import numpy as np

__all__ = ["decode_mp4", "encode_mp4"]


def encode_mp4(frames: np.ndarray, fps: float, crf: int) -> bytes:
    """uint8 [T, H, W, 3] (H and W even) -> a reproducible mp4 file (h264, one thread, yuv420p, faststart)."""
    raise NotImplementedError


def decode_mp4(data: bytes | memoryview) -> np.ndarray:
    """An mp4 file -> uint8 [T, H, W, 3], every frame in order."""
    raise NotImplementedError
