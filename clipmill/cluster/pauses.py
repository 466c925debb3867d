"""Growing, random, bounded pauses between attempts."""

from __future__ import annotations

import random

__all__ = ["MAX_PAUSE_SECONDS", "pause"]

FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0


def pause(failures: int, max_seconds: float = MAX_PAUSE_SECONDS) -> float:
    """Seconds to wait after ``failures`` failures in a row, the first of them counted.

    Doubles with each failure up to ``max_seconds``, times a random factor between a half and one: whatever failed
    together should not come back together.
    """
    return min(FIRST_PAUSE_SECONDS * 2 ** min(failures - 1, 30), max_seconds) * random.uniform(0.5, 1)
