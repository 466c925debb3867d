"""Whose fault an exception is: that of one video, which is excluded, or the environment's, which fails the unit.

The line, drawn here alone: whatever is raised while one video is fetched, described, decoded or packed belongs to that
video, except what would meet the next video as well. That is memory, disk, network and storage of this machine, a
library that is missing, and any error that says itself whom it is for (`ClipmillError`).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipmill import storage
from clipmill.errors import ClipmillError
from clipmill.pipeline.fetch import ExcludedVideo
from clipmill.video import DecoderLost

__all__ = ["exclude_on_error", "scrub"]

_OF_ONE_FILE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.EINVAL,
    errno.ENXIO,
    errno.EFBIG,
    errno.EOVERFLOW,
}
"""What an operating system says of one name or file. Any other number is of the disk, the network or the process."""

_ENVIRONMENTS = ClipmillError | DecoderLost | MemoryError | ImportError | ConnectionError | TimeoutError

_MOST_CHARACTERS = 300
"""Of a cause."""


@contextmanager
def exclude_on_error(stage: str, video_name: str, scratch: Path) -> Iterator[None]:
    """Turns an exception that belongs to a video into its exclusion; others pass.

    Args:
        stage: what is being done: ``fetch``, ``sidecar``, ``decode`` or ``pack``.
        video_name: of the video.
        scratch: where this machine works: a file that is missing there is no fault of the video.

    Raises:
        ExcludedVideo: the video's fault.
    """
    try:
        yield
    except ExcludedVideo:
        raise
    except Exception as error:
        if _is_environments(error, scratch):
            raise
        text = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {text[0][:_MOST_CHARACTERS]}" if text else type(error).__name__
        raise ExcludedVideo(stage, scrub(cause, scratch, video_name)) from error


def _is_environments(error: Exception, scratch: Path) -> bool:
    if isinstance(error, storage.Unreadable):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _OF_ONE_FILE or str(error.filename).startswith(str(scratch))
    return isinstance(error, _ENVIRONMENTS)


def scrub(text: str, path: Path, name: str) -> str:
    """Takes out of a message what differs from run to run: where the video lay, and addresses in memory."""
    return re.sub(r"0x[0-9a-fA-F]{6,}", "0x..", text.replace(str(path), name))
