"""Decodes videos in a child process that can be killed, so that no video can bring down the parent.

A hostile video can make a decoder loop forever with the GIL held, abort the process or use up all memory; only a
separate process can be stopped then. One child decodes, cuts and encodes one video after another, so that pixels never
cross a pipe::

    with Decoder(Limits(cpu_seconds=3600, memory_bytes=4 * 2**30, no_progress_seconds=120)) as decoder:
        for clip in decoder.clips(path, config.data.clip, "auto", encode=("mp4", 16)):
            ...                # clip.data: bytes of an mp4 or mkv member, or uint8 [T, H, W, 3]
        decoder.outcome        # result of the video

A video gives all of its clips or none: the first clip is delivered after the whole video has been decoded. Until then
the encoded clips wait in an unlinked spool file that parent and child share.
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
"""Format of the clips and its quality: the constant rate factor of mp4, libjpeg's quality of mjpeg, None for npy."""


class BadVideo(Exception):
    """The video cannot be decoded. The failure was reproduced in a fresh child (after decord also with PyAV).

    Attributes:
        cause: the reason of the last attempt in one line.
        attempts: one line per attempt, oldest first (``"decord: no progress for 120 s"``).
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
        frame_numbers: numbers of its frames, in presentation order; frames of the span are numbered from 0.
        frame_seconds: presentation time of each of these frames, from the first frame of the file.
        start_seconds: time from which its first frame is shown.
        end_seconds: time at which its last frame ends.
        fps: frames per second of the clip as it is stored.
        view: number of the view, and where it was cut; None if there is one view only, the centre.
        data: an h264 mp4 file or an MJPEG mkv file (``bytes``), or uint8 [T, H, W, 3] if the format is ``npy``.
        pixel_sum: exact sum of its uint8 values before encoding.
        pixel_square_sum: exact sum of their squares.
        num_values: T * H * W * 3.
        squared_error: exact sum over the values of (decoded - original)^2; None if this clip is not in the measured
            sample.
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
    """The result of a video that was decoded to its end.

    Attributes:
        info: the probe, with the decoder that was finally used.
        num_frames: undamaged frames that the decoder delivered.
        damaged_frames: frames that were dropped: damaged, or before a key frame.
        joins: places where recordings were joined.
        num_clips: clips that the clip rule made of them; each view counts.
        truncated: the file ends clearly before the duration and the frame count that it declares. False if
            ``max_clips_per_video`` stopped the reading early.
        short: the video, or each of its scenes, has fewer frames than one clip spans.
        filtered: the key of ``data.clip`` whose bound the video violates (``min_seconds``); it then gives no clip.
        num_static: clips rejected because nothing moves in them.
        num_black: clips rejected because they are dark throughout.
        num_needed_frames: number of the last frame of any clip, plus one.
        attempts: failed attempts before the successful one, as in `BadVideo`; almost always empty.
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
    """One decoding child, reused from video to video and replaced after a failure. Use it from one thread at a time.

    The child dies with the thread that started it (Linux) and when its stdin closes.

    Attributes:
        outcome: result of the video that `clips` decoded last; None before the first video and after `BadVideo`.
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
            decoder: which decoder to use; ``auto`` lets the probe decide.
            encode: format and quality.
            key: seeds everything random about this video: its views, and which of its clips are measured.
            span: the part of the file that is the video, in seconds from the file's first frame.

        Raises:
            BadVideo: the video cannot be decoded.
            DecoderLost: the environment failed.
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
            "rgb_first": decoder == "decord",  # also if PyAV takes over: all pixels of a data set are made the same way
            "views": clip.views_per_clip,
            "flip": clip.flip_views,
            "encode": encode,
            "key": key,
        }
        messages, attempts = self._decode(request)
        done = messages.pop()
        if done["filtered"] is not None:  # if no header states the duration, it is known only at the end
            messages = []
        info = VideoInfo(**done.pop("info"))
        self.outcome = Outcome(info=info, num_clips=len(messages), attempts=attempts, **done)
        for message in messages:
            yield self._read_clip(message, clip, is_encoded=encode[0] != "npy")

    def picture(self, path: str | Path, clip: ClipConfig) -> np.ndarray:
        """A still picture in the size of a clip's frames: uint8 [H, W, 3].

        Args:
            path: local file.
            clip: the clip rule; ``resolution`` and ``fit`` are used.

        Raises:
            BadVideo: the file is not a picture, or is damaged.
            DecoderLost: the environment failed.
        """
        request = {"path": os.path.abspath(path), "still": True, "size": clip.size, "fit": clip.fit}
        messages, _ = self._decode(request)
        data = os.pread(self._spool.fileno(), messages[-1]["num_bytes"], 0)
        return np.frombuffer(data, np.uint8).reshape(*clip.size, 3)

    def _decode(self, request: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """(one message per clip and a final one for the video, the failed attempts before)."""
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
                    # Never the other way round: if PyAV fails, decord is often wrong without reporting an error.
                    request = {**request, "decoder": "pyav"}
                elif len(attempts) >= 2:
                    raise BadVideo(str(fault), attempts, stderr_tail) from None
            except BaseException:  # including interrupts: the child is in the middle of a video
                self._discard_child()
                raise

    def _attempt(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Has the child decode one video."""
        if self._child is None:
            self._child = Child(self._limits, self._spool.fileno())
        self._spool.truncate(0)
        return self._child.decode(request, self._limits.no_progress_seconds)

    def _read_clip(self, message: dict[str, Any], clip: ClipConfig, *, is_encoded: bool) -> Clip:
        """Reads a clip from the spool file."""
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
