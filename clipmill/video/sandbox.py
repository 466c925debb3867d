"""A child process that decodes videos and can be killed: the parent survives whatever a video does to a decoder.

Decoders can loop for ever holding the GIL, abort the process or eat all memory: only a process of its own can be
stopped then. One child decodes, cuts and encodes (so that pixels never cross a pipe), one video after another::

    with Decoder(Limits(cpu_seconds=3600, memory_bytes=4 * 2**30, no_progress_seconds=120)) as decoder:
        for clip in decoder.clips(path, config.data.clip, "auto", encode=("mp4", 16)):
            ...                # clip.data: bytes of an mp4 or mkv member, or uint8 [T, H, W, 3]
        decoder.outcome        # what became of the video

A video is all or nothing: the first clip appears once the whole video has been decoded, so a bad video has delivered
nothing. Until then its clips wait, encoded, in an unlinked spool file that parent and child share.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from clipmill.video.child import Child, DecoderLost, Limits, VideoFault
from clipmill.video.clips import ClipRule
from clipmill.video.decoders.picture import Span
from clipmill.video.filters import VideoFilter
from clipmill.video.probe import DecoderChoice, VideoInfo
from clipmill.video.views import View

if TYPE_CHECKING:  # the child needs no pydantic
    from clipmill.config import ClipConfig

__all__ = ["BadVideo", "Clip", "Decoder", "DecoderLost", "Encoding", "Limits", "Outcome"]

Encoding = tuple[Literal["mp4", "npy", "mjpeg"], int | None]
"""Format of the clips and its quality: mp4's constant rate factor, libjpeg's quality of mjpeg; None for npy."""


class BadVideo(Exception):
    """The video's fault, reproduced in a fresh child and, where another decoder is right for the file, by that one.

    Attributes:
        cause: one line, of the last attempt.
        attempts: one line for each attempt, oldest first (``"decord: no progress for 120 s"``).
        stderr_tail: the last lines that the decoder printed.
    """

    def __init__(self, cause: str, attempts: list[str], stderr_tail: str):
        super().__init__(cause, attempts, stderr_tail)
        self.cause = cause
        self.attempts = attempts
        self.stderr_tail = stderr_tail

    def __str__(self) -> str:
        return f"{self.cause} (attempts: {'; '.join(self.attempts)})"


@dataclass(frozen=True)
class Clip:
    """One finished clip.

    Attributes:
        ordinal: number of the clip within its video.
        frame_numbers: of its frames in the video, in presentation order. Whole frames of the span count, from 0.
        frame_seconds: presentation time of each of these frames, from the first frame of the file.
        start_seconds: time from which its first frame is shown.
        end_seconds: time at which its last frame ends.
        fps: frames per second of the clip as it is stored.
        view: number of the view of this clip, and where it was cut; none where there is one view, the centre.
        data: an h264 mp4 file or an MJPEG mkv file (``bytes``), or uint8 [T, H, W, 3] where the format is ``npy``.
        pixel_sum: exact sum of its uint8 values before encoding.
        pixel_square_sum: exact sum of their squares.
        num_values: T * H * W * 3.
        squared_error: exact sum over the values of (decoded - original)^2, where this clip is one of the sample whose
            encoding is measured.
    """

    ordinal: int
    frame_numbers: tuple[int, ...]
    frame_seconds: tuple[float, ...]
    start_seconds: float
    end_seconds: float
    fps: float
    view: tuple[int, View] | None
    data: bytes | np.ndarray
    pixel_sum: int
    pixel_square_sum: int
    num_values: int
    squared_error: int | None


@dataclass(frozen=True)
class Outcome:
    """What became of a video that was decoded to its end.

    Attributes:
        info: what the probe found, with the decoder that was used in the end.
        num_frames: whole frames that the decoder delivered.
        damaged_frames: frames that were dropped: damaged, or before a key frame.
        joins: places where recordings were joined.
        num_clips: clips that the clip rule made of them, each view counted.
        truncated: the file ends well before the duration or the frame count that it declares (False where
            ``max_clips_per_video`` ended the reading early).
        short: the video, or each of its scenes, has fewer frames than one clip spans.
        filtered: the key of ``data.clip`` whose bound the video breaks (``min_seconds``); it then gives no clip.
        num_static: clips rejected because nothing moves in them.
        num_black: clips rejected because they are dark throughout.
        num_needed_frames: number of the last frame of any clip, plus one.
        attempts: failed attempts before the good one (empty almost always), as in `BadVideo`.
    """

    info: VideoInfo
    num_frames: int
    damaged_frames: int
    joins: int
    num_clips: int
    truncated: bool
    short: bool
    filtered: str | None
    num_static: int
    num_black: int
    num_needed_frames: int
    attempts: list[str]


class Decoder:
    """One decoding child, reused from video to video and replaced after a fault. For one thread at a time.

    The child dies with the thread that started it (Linux) and when its stdin closes.

    Attributes:
        outcome: of the video that `clips` decoded last; None before that and after `BadVideo`.
    """

    def __init__(self, limits: Limits):
        self.outcome: Outcome | None = None
        self._limits = limits
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this object
        self._child: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child, waits for it, and frees the spool file."""
        self._discard_child()
        self._spool.close()

    def clips(
        self,
        path: str | Path,
        clip: ClipConfig,
        decoder: DecoderChoice = "auto",
        *,
        encode: Encoding = ("mp4", 16),
        key: str = "",
        span: Span = (None, None),
    ) -> Iterator[Clip]:
        """Decodes a local file once, in order, and yields its clips.

        Args:
            path: local file.
            clip: the clip rule.
            decoder: which decoder to use; ``auto``: by the probe.
            encode: format and quality.
            key: of everything random about this video: its views, and which of its clips are measured.
            span: the part of the file that is the video, in seconds from the file's first frame.

        Raises:
            BadVideo: the video's fault.
            DecoderLost: the environment's fault.
        """
        self.outcome = None
        rule = ClipRule(
            num_frames=clip.num_frames,
            frame_stride=clip.frame_stride,
            step=clip.step,
            max_clips=clip.max_clips_per_video,
            fps=clip.fps,
            scene_cut=clip.scene_cut,
            reject_static=clip.reject_static,
            reject_black=clip.reject_black,
        )
        request = {
            "path": os.path.abspath(path),
            "rule": rule,
            "filter": [getattr(clip, name) for name in VideoFilter._fields],
            "span": span,
            "size": clip.size,
            "fit": clip.fit,
            "decoder": decoder,
            "rgb_first": decoder == "decord",  # also of PyAV where it takes over: one data set, one way to the pixels
            "views": clip.views_per_clip,
            "flip": clip.flip_views,
            "encode": encode,
            "key": key,
        }
        messages, attempts = self._decode(request)
        done = messages.pop()
        if done["filtered"] is not None:  # a duration that no header states is known at the end only
            messages = []
        info = VideoInfo(**done.pop("info"))
        self.outcome = Outcome(info=info, num_clips=len(messages), attempts=attempts, **done)
        for message in messages:
            yield self._read_clip(message, clip, is_encoded=encode[0] != "npy")

    def picture(self, path: str | Path, clip: ClipConfig) -> np.ndarray:
        """A still picture in the size of a clip's frames: uint8 [H, W, 3].

        Args:
            path: local file.
            clip: whose ``resolution`` and ``fit`` count.

        Raises:
            BadVideo: no picture, or a damaged one.
            DecoderLost: the environment's fault.
        """
        request = {"path": os.path.abspath(path), "still": True, "size": clip.size, "fit": clip.fit}
        messages, _ = self._decode(request)
        data = os.pread(self._spool.fileno(), messages[-1]["num_bytes"], 0)
        return np.frombuffer(data, np.uint8).reshape(*clip.size, 3)

    def _decode(self, request: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """(one message for each clip and a last one for the video, the failed attempts before)."""
        attempts: list[str] = []
        while True:
            try:
                return self._attempt(request), attempts
            except VideoFault as fault:
                child = self._child
                assert child is not None
                name = child.decoder_in_use or "probe"
                attempts.append(f"{name}: {fault}")
                stderr_tail = child.stderr_tail()
                self._discard_child()
                if len(attempts) == 2 and name == "decord":
                    # Never the other way round: where PyAV fails, decord is often wrong, and silently.
                    request = {**request, "decoder": "pyav"}
                elif len(attempts) >= 2:
                    raise BadVideo(str(fault), attempts, stderr_tail) from None
            except BaseException:  # also an interrupt: the child is in the middle of a video
                self._discard_child()
                raise

    def _attempt(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Takes one video through the child."""
        if self._child is None:
            self._child = Child(self._limits, self._spool.fileno())
        self._spool.truncate(0)
        return self._child.decode(request, self._limits.no_progress_seconds)

    def _read_clip(self, message: dict[str, Any], clip: ClipConfig, *, is_encoded: bool) -> Clip:
        """A clip out of the spool file."""
        offset, num_bytes = message.pop("offset"), message.pop("num_bytes")
        data = os.pread(self._spool.fileno(), num_bytes, offset)
        if len(data) != num_bytes:
            raise DecoderLost(f"the spool file holds {len(data)} of {num_bytes} bytes of a clip")
        shape = (clip.num_frames, *clip.size, 3)
        message["frame_numbers"] = tuple(message["frame_numbers"])
        message["frame_seconds"] = tuple(message["frame_seconds"])
        if message["view"] is not None:
            number, place = message["view"]
            message["view"] = number, View(*place)
        return Clip(data=data if is_encoded else np.frombuffer(data, np.uint8).reshape(shape), **message)

    def _discard_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()
