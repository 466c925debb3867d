"""A child process that decodes videos and can be killed: the parent survives whatever a video does to a decoder.

The parent-side API (skeleton; the implementation follows)::

    limits = Limits(cpu_seconds=3600, memory_bytes=4 * 2**30, no_progress_seconds=120)
    with Decoder(limits) as decoder:                  # spawns the child at the first video
        try:
            for clip in decoder.clips(path, config.data.clip, "auto", encode=("mp4", 16)):
                ...                                   # clip.data: bytes (mp4) or uint8 [T, H, W, 3] (npy)
            decoder.outcome                           # Outcome of the video just finished
        except BadVideo as bad:                       # the video's fault, reproduced: quarantine it
            bad.cause, bad.attempts, bad.stderr_tail
        # DecoderLost (the environment's fault) flies on: the unit is retried

A video is all or nothing: ``clips`` yields its first clip only once the whole video has been decoded, so a bad
video has delivered nothing. Finished clips wait in an unlinked spool file on local disk, encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from clipmill.config import ClipConfig
from clipmill.video.probe import VideoInfo

__all__ = ["BadVideo", "Clip", "Decoder", "DecoderLost", "Limits", "Outcome"]


class BadVideo(Exception):
    """The video's fault: a decoder error or a limit, reproduced in a fresh child and by the other decoder.

    Attributes:
        cause: one line.
        attempts: one line for each attempt, oldest first (``"decord: no progress for 120 s"``).
        stderr_tail: the last lines that the decoder printed.
    """

    cause: str
    attempts: list[str]
    stderr_tail: str


class DecoderLost(Exception):
    """The environment's fault: the child was killed from outside, could not start, or a disk failed."""


@dataclass(frozen=True)
class Limits:
    """What one video may cost."""

    cpu_seconds: float
    memory_bytes: int
    no_progress_seconds: float


@dataclass(frozen=True)
class Clip:
    """One finished clip.

    Attributes:
        ordinal: number of the clip within its video.
        first_frame: index of its first frame in the video, in presentation order.
        start_seconds: presentation time of its first frame.
        end_seconds: presentation time at which its last frame ends.
        fps: frames per second of the clip as it is stored (the video's over ``frame_stride``).
        data: an h264 mp4 file (``bytes``), or uint8 [T, H, W, 3] where the format is ``npy``.
        pixel_sum: exact sum of its uint8 values before encoding.
        pixel_square_sum: exact sum of their squares.
        num_values: T * H * W * 3.
    """

    ordinal: int
    first_frame: int
    start_seconds: float
    end_seconds: float
    fps: float
    data: bytes | np.ndarray
    pixel_sum: int
    pixel_square_sum: int
    num_values: int


@dataclass(frozen=True)
class Outcome:
    """What became of a video that was decoded to its end.

    Attributes:
        info: what the probe found, with the decoder that was used in the end.
        num_frames: frames that the decoder delivered.
        num_clips: clips that the clip rule made of them.
        truncated: the file ends well before the duration or the frame count that it declares.
        short: fewer frames than one clip spans.
        attempts: failed attempts before the good one (empty almost always), as in `BadVideo`.
    """

    info: VideoInfo
    num_frames: int
    num_clips: int
    truncated: bool
    short: bool
    attempts: list[str]

    def as_document(self) -> dict[str, object]:
        """The outcome as plain JSON values (``info`` nested)."""
        raise NotImplementedError


class Decoder:
    """One decoding child, reused from video to video and restarted after a kill. For one thread.

    Attributes:
        outcome: of the video that `clips` finished last; None while one is under way or after `BadVideo`.
    """

    outcome: Outcome | None

    def __init__(self, limits: Limits, scratch: Path | None = None):
        """``scratch``: local folder for the spool file; none: the system's temporary folder."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child and waits for it."""
        raise NotImplementedError

    def clips(
        self,
        path: str | Path,
        clip: ClipConfig,
        decoder: Literal["auto", "decord", "pyav"] = "auto",
        *,
        encode: tuple[Literal["mp4", "npy"], int] = ("mp4", 16),
    ) -> Iterator[Clip]:
        """Decodes a local file once, in order, and yields its clips.

        Args:
            path: local file.
            clip: the clip rule.
            decoder: which decoder to use; ``auto``: by the probe.
            encode: format and, for mp4, the constant rate factor.

        Raises:
            BadVideo: the video's fault.
            DecoderLost: the environment's fault.
        """
        raise NotImplementedError
