"""Decides whether an exception excludes one video, or comes from the environment and fails the unit.

This is the only place that decides it. An exception while one video is fetched, described, decoded or packed excludes
that video, unless the next video would meet it too: memory, disk, network and storage of this machine, a missing
library, and every `ClipmillError`.
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
"""Error numbers that concern one name or file. All others concern the disk, the network or the process."""

_ENVIRONMENTS = ClipmillError | DecoderLost | MemoryError | ImportError | ConnectionError | TimeoutError

_MOST_CHARACTERS = 300
"""Longest text of a cause."""


@contextmanager
def exclude_on_error(stage: str, video_name: str, scratch: Path) -> Iterator[None]:
    """Turns an exception that one video causes into its exclusion. Others pass unchanged.

    Args:
        stage: the current step: ``fetch``, ``sidecar``, ``decode`` or ``pack``.
        video_name: name of the video.
        scratch: the temporary folder of this machine; a file missing there does not exclude the video.

    Raises:
        ExcludedVideo: the video causes the error.
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
    """Removes from a message what differs between runs: the local path of the video, and memory addresses."""
    return re.sub(r"0x[0-9a-fA-F]{6,}", "0x..", text.replace(str(path), name))
