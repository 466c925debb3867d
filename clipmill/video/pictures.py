"""Clips as pictures for people: contact sheets, and playing rows for a web page."""

from __future__ import annotations

import numpy as np

__all__ = ["contact_sheet", "playing_row", "png_bytes"]


def png_bytes(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> a PNG file."""
    raise NotImplementedError


def contact_sheet(clips: np.ndarray, *, max_columns: int = 8) -> bytes:
    """uint8 [N, T, H, W, 3] -> a PNG file: one row a clip, frames left to right (at most max_columns, evenly spaced)."""
    raise NotImplementedError


def playing_row(clips: np.ndarray, *, fps: float, scale: int = 2, gap: int = 4, crf: int = 18) -> bytes:
    """uint8 [N, T, H, W, 3] -> one mp4 file that plays the clips side by side, enlarged ``scale`` times (nearest)."""
    raise NotImplementedError
