"""Growing, random, bounded pauses between attempts."""

from __future__ import annotations

import random

__all__ = ["MAX_PAUSE_SECONDS", "pause"]

FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0


def pause(failures: int, max_seconds: float = MAX_PAUSE_SECONDS, first_seconds: float = FIRST_PAUSE_SECONDS) -> float:
    """Seconds to wait after ``failures`` failures in a row (1 after the first).

    The pause is ``first_seconds`` after the first failure and doubles with each further one, up to ``max_seconds``. It
    is multiplied by a random factor between 0.5 and 1, so that callers that failed together do not retry together.
    """
    return min(first_seconds * 2 ** min(failures - 1, 30), max_seconds) * random.uniform(0.5, 1)
