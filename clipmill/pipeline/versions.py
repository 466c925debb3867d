"""The versions that the bytes of a unit depend on, in addition to the plan."""

from __future__ import annotations

import functools
import platform
from importlib import metadata
from pathlib import Path

import clipmill
from clipmill.video import decord_version

__all__ = ["versions"]


@functools.cache
def versions(decoder: str) -> dict[str, str]:
    """The installed versions and the CPU's class, for commit records."""
    return {
        "clipmill": clipmill.__version__,
        "av": metadata.version("av"),  # its wheel holds FFmpeg and libx264
        **(decord_version() if decoder == "decord" else {}),
        "pillow": metadata.version("pillow"),  # its wheel holds libjpeg-turbo
        "cpu": f"{platform.machine()} {_vector_instructions()}",
    }


def _vector_instructions() -> str:
    """The widest vector instructions. libx264 and swscale choose their code, and so their rounding, by them."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    return next((name for name in ("avx512f", "avx2", "avx", "sse4_2", "sve", "asimd") if name in flags), "plain")
