"""Errors of reading a video, separated into those of the video and those of the machine."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

__all__ = ["VideoError", "as_video_error"]

_DECORD_PREFIX = re.compile(r"\[[\d:]+\] \S+: ")
"""Time of day and source line in decord's messages. They are removed so that the same error always has the same text.
"""

_ENVIRONMENT_ERRORS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}


class VideoError(Exception):
    """The video cannot be read; the message gives the reason in one line."""


@contextmanager
def as_video_error(action: str, path: str | Path) -> Iterator[None]:
    """Turns a decoder's errors about a file into VideoError. Memory and environment errors pass unchanged."""
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRORS and not _is_demuxers_own(error, path):
            raise
        reason = error.strerror if isinstance(error, av.FFmpegError) else _DECORD_PREFIX.sub("", str(error))
        first_line = (reason.strip() or type(error).__name__).splitlines()[0][:300]
        raise VideoError(f"{action}: {first_line}") from error


def _is_demuxers_own(error: OSError, path: str | Path) -> bool:
    """Whether FFmpeg reports an I/O error for a readable file, as Matroska's demuxer does for truncated files."""
    if not isinstance(error, av.FFmpegError):
        return False
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True
