"""The generated data set of ``clipmill demo``: simple objects under simple forces."""

from __future__ import annotations

__all__ = ["CLASSES", "generate"]

CLASSES: tuple[str, ...] = ()


def generate(url: str, *, num_videos: int = 240, seed: int = 0) -> bool:
    """Writes CLASS/NAME.mp4 and CLASS/NAME.actions.npy below ``url``; returns False when it was complete already."""
    raise NotImplementedError
