"""How long a process has between SIGTERM and SIGKILL."""

from __future__ import annotations

import os

__all__ = ["seconds_until_kill"]

JOB_STOP_SECONDS = 3.0
"""Ray's default of RAY_JOB_STOP_WAIT_TIME_S."""


def seconds_until_kill() -> float | None:
    """Seconds from SIGTERM to SIGKILL in the driver of a Ray job; None elsewhere, where they are unknown."""
    seconds = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
    if seconds is None and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # nobody submitted this process
        return None
    return float(seconds or JOB_STOP_SECONDS)
