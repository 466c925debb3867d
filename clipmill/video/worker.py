"""The child of `clipmill.video.sandbox`: decodes, cuts and encodes one video after another under limits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from av import VideoFrame

from clipmill.video import confine
from clipmill.video.clips import ClipCutter, ClipFrames, ClipRule
from clipmill.video.confine import SendMessage
from clipmill.video.decode import is_truncated, read_frames
from clipmill.video.decoders.by_pillow import read_still
from clipmill.video.decoders.picture import Reading, Span
from clipmill.video.decoders.whole import span_seconds
from clipmill.video.encode import decode_mp4, encode_mp4
from clipmill.video.errors import VideoError
from clipmill.video.filters import VideoFilter
from clipmill.video.geometry import UPRIGHT, Geometry, Resizer
from clipmill.video.mjpeg import decode_mjpeg, encode_mjpeg
from clipmill.video.probe import VideoInfo, probe
from clipmill.video.views import draw_view, take_view, view_frame_size

__all__ = ["is_measured", "serve"]

Timed = tuple[float, np.ndarray]
"""(presentation time in seconds, uint8 [H, W, 3])."""

_ENCODERS: dict[str, Callable[[np.ndarray, float, Any], bytes | memoryview]] = {
    "mp4": encode_mp4,
    "mjpeg": encode_mjpeg,
    "npy": lambda frames, _, __: np.ascontiguousarray(frames).data.cast("B"),
}
_DECODERS = {"mp4": decode_mp4, "mjpeg": decode_mjpeg}

_HEARTBEAT_SECONDS = 0.1

_EXACT_VALUES = 256
"""The squares of this many bytes sum to less than 2**24, where float32 is exact. float64 would take twice as long."""

_PIXELS_PER_CPU_SECOND = 20e6
"""Slowest assumed decoding and resizing speed of one core. 4K HEVC of 10 bits takes a third of this time."""
_LONGEST_CPU_SECONDS = 48 * 3600
"""Upper limit, because a damaged header may state any duration."""


def serve() -> None:
    """Answers requests until its parent closes the pipe."""
    confine.serve(_answer)


def _answer(request: dict[str, Any], spool: int, send: SendMessage) -> None:
    """Decodes one video, and reports a failure as one of the video or of the environment."""
    try:
        (_decode_still if request.get("still") else _decode)(request, spool, send)
    except VideoError as error:
        send({"kind": "video_fault", "cause": str(error)})
    except MemoryError:
        send({"kind": "video_fault", "cause": "memory limit reached"})
    except OSError as error:
        send({"kind": "environment_fault", "cause": f"{type(error).__name__}: {error}"})


def _decode_still(request: dict[str, Any], spool: int, send: SendMessage) -> None:
    """Writes a still picture into the spool file, resized like a frame of a video."""
    send({"kind": "decoder", "name": "pillow"})
    pixels = read_still(request["path"])
    height, width = pixels.shape[:2]
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    resized = Resizer(tuple(request["size"]), request["fit"], whole=False)(frame, Geometry(width, height, 1.0, UPRIGHT))
    data = np.ascontiguousarray(resized).tobytes()
    confine.write_all(spool, data, 0)
    send({"kind": "done", "num_bytes": len(data)})


def _decode(request: dict[str, Any], spool: int, send: SendMessage) -> None:
    """Writes the clips of a video into the spool file, and sends where they are."""
    info = probe(request["path"], request["decoder"])
    send({"kind": "decoder", "name": info.decoder})
    span: Span = tuple(request["span"])
    seconds = span_seconds(info, span)
    confine.limit_cpu(max(request["cpu_seconds"], _slowest_seconds(info, seconds)))
    rule, video_filter = ClipRule(*request["rule"]), VideoFilter(*request["filter"])
    cutter, reading = ClipCutter(rule, info.fps), Reading()
    writer = _ClipWriter(request, rule.fps or info.fps / rule.frame_stride, spool, send)
    filtered = video_filter.refuses(info, seconds)
    if filtered is None:
        frames = read_frames(
            request["path"],
            info,
            writer.frame_size,
            request["fit"],
            whole=writer.num_views > 1,
            rgb_first=request["rgb_first"],
            span=span,
            reading=reading,
        )
        for clip in cutter.cut(_with_heartbeat(frames, send), reading):
            writer.write(clip)
        if not reading.num_frames:
            raise VideoError(_why_no_frame(reading, span))
        if seconds is None:
            filtered = video_filter.refuses(info, reading.last_seconds - reading.first_seconds + 1 / info.fps)
    stopped_early = cutter.num_kept == rule.max_clips or reading.is_past_span
    send(
        {
            "kind": "done",
            "info": asdict(info),
            "truncated": filtered is None and not stopped_early and _is_truncated(info, reading, span),
            "short": filtered is None and cutter.is_short,
            "filtered": filtered,
            "num_needed_frames": writer.num_needed_frames,
            **_counts(reading, cutter),
        }
    )


def _is_truncated(info: VideoInfo, reading: Reading, span: Span) -> bool:
    return is_truncated(info, reading.num_frames, reading.first_seconds, reading.last_seconds, span)


def _counts(reading: Reading, cutter: ClipCutter) -> dict[str, int]:
    """The counts of an `Outcome`."""
    return {
        "num_frames": reading.num_frames,
        "damaged_frames": reading.damaged_frames,
        "joins": reading.joins,
        "num_static": cutter.num_static,
        "num_black": cutter.num_black,
    }


def _slowest_seconds(info: VideoInfo, seconds: float | None) -> float:
    """Processor time in which even a slow codec decodes a video of this size and duration; 0 if unknown."""
    num_pixels = info.width * info.height * info.fps * (seconds or 0.0)
    return min(num_pixels / _PIXELS_PER_CPU_SECOND, _LONGEST_CPU_SECONDS)


def _why_no_frame(reading: Reading, span: Span) -> str:
    if reading.damaged_frames:
        cause = "" if reading.cause is None else f": {reading.cause}"
        return f"all {reading.damaged_frames} frames are damaged or lie before a key frame{cause}"
    if span != (None, None):
        start, end = ("" if bound is None else f"{bound:g}" for bound in span)
        return f"no frame is shown in the span {start}..{end} s"
    return f"no frame could be decoded{'' if reading.cause is None else f': {reading.cause}'}"


class _ClipWriter:
    """Encodes the views of a video's clips into the spool file, one after the other, and sends where they are.

    Attributes:
        num_views: views per clip.
        frame_size: (height, width) that the frames must have.
        num_needed_frames: number of the last frame of any clip, plus one.
    """

    def __init__(self, request: dict[str, Any], fps: float, spool: int, send: SendMessage):
        self._size: tuple[int, int] = tuple(request["size"])
        self._codec, self._quality = request["encode"]
        self._key, self._may_flip, self._fps = request["key"], request["flip"], fps
        self._spool, self._send = spool, send
        self._pixel_sums = _PixelSums()
        self._end = 0
        self.num_views: int = request["views"]
        self.frame_size = self._size if self.num_views == 1 else view_frame_size(self._size)
        self.num_needed_frames = 0

    def write(self, clip: ClipFrames) -> None:
        """Writes all views of a clip."""
        self.num_needed_frames = max(self.num_needed_frames, clip.frame_numbers[-1] + 1)
        for number in range(self.num_views):
            key = f"{self._key}:{clip.ordinal}:{number}"
            view, pixels = None, clip.frames
            if self.num_views > 1:
                height, width = pixels.shape[1:3]
                view = draw_view(key, height, width, self._size, may_flip=self._may_flip)
                pixels = take_view(pixels, view, self._size)
            data = _ENCODERS[self._codec](pixels, self._fps, self._quality)
            confine.write_all(self._spool, data, self._end)
            self._send(
                {
                    "kind": "clip",
                    "ordinal": clip.ordinal,
                    "frame_numbers": clip.frame_numbers,
                    "frame_seconds": clip.frame_seconds,
                    "start_seconds": clip.start_seconds,
                    "end_seconds": clip.end_seconds,
                    "fps": self._fps,
                    "view": None if view is None else (number, view),
                    "offset": self._end,
                    "num_bytes": len(data),
                    "squared_error": _squared_error(self._codec, data, pixels) if is_measured(key) else None,
                    **self._pixel_sums(pixels),
                }
            )
            self._end += len(data)


class _PixelSums:
    """Exact sums over all values of a clip. One buffer is reused: new memory per clip would cost page faults."""

    def __init__(self) -> None:
        self._rows = np.empty((0, _EXACT_VALUES), np.float32)
        self._ones = np.ones(_EXACT_VALUES, np.float32)

    def __call__(self, pixels: np.ndarray) -> dict[str, int]:
        """Number, sum and sum of squares of uint8 values."""
        num_rows = -(-pixels.size // _EXACT_VALUES)
        if num_rows > len(self._rows):
            self._rows = np.empty((num_rows, _EXACT_VALUES), np.float32)
        rows = self._rows[:num_rows]
        values = rows.reshape(-1)
        values[: pixels.size], values[pixels.size :] = pixels.reshape(-1), 0  # zeros at the end add nothing
        return {
            "num_values": pixels.size,
            "pixel_sum": int((rows @ self._ones).sum(dtype=np.float64)),
            "pixel_square_sum": int(np.vecdot(rows, rows).sum(dtype=np.float64)),
        }


def is_measured(key: str) -> bool:
    """Whether the encoding error of a clip is measured. The key selects one of sixteen: decoding costs half of
    encoding.
    """
    return hashlib.blake2b(f"measure:{key}".encode(), digest_size=1).digest()[0] < 16


def _squared_error(codec: str, data: bytes | memoryview, pixels: np.ndarray) -> int | None:
    """Exact sum of the squared errors of a lossy clip; None for npy."""
    if codec not in _DECODERS:
        return None
    error = _DECODERS[codec](bytes(data)).reshape(-1).astype(np.float64) - pixels.reshape(-1)
    return int(error @ error)


def _with_heartbeat(frames: Iterator[Timed], send: SendMessage) -> Iterator[Timed]:
    """Passes frames on, and regularly sends the parent a sign of progress."""
    sent_at = 0.0
    for timed_frame in frames:
        now = time.monotonic()
        if now - sent_at > _HEARTBEAT_SECONDS:
            send({"kind": "progress"})
            sent_at = now
        yield timed_frame
