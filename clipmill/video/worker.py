"""The child of `clipmill.video.sandbox`: decodes, cuts and encodes one video after another under limits."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from clipmill.video.clips import ClipCutter, ClipRule
from clipmill.video.decode import is_truncated, read_frames
from clipmill.video.encode import decode_mp4, encode_mp4
from clipmill.video.jpgs import decode_jpgs, encode_jpgs
from clipmill.video.probe import VideoError, probe
from clipmill.video.views import draw_view, roomy, take_view

__all__ = ["is_measured", "serve"]

Say = Callable[[dict[str, Any]], None]
"""Sends one message to the parent."""

_ENCODERS: dict[str, Callable[[np.ndarray, float, Any], bytes]] = {
    "mp4": encode_mp4,
    "jpgs": lambda frames, _, quality: encode_jpgs(frames, quality),
    "npy": lambda frames, _, __: frames.tobytes(),
}
_DECODERS = {"mp4": decode_mp4, "jpgs": decode_jpgs}

_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_SIGNS_OF_LIFE = 0.1


def serve() -> None:
    """Answers requests on stdin until it closes. Arguments: spool descriptor, parent's pid, bytes, CPU seconds."""
    spool, parent, memory_bytes = map(int, sys.argv[1:4])
    cpu_seconds = float(sys.argv[4])
    _die_with(parent)
    # Decoders print to stdout: the messages get a descriptor of their own, and stdout becomes stderr.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import decord  # noqa: F401  loaded before the memory limit counts

    _limit_memory(memory_bytes)

    def say(message: dict[str, Any]) -> None:
        # Nobody reads of a clip before its video has ended: no reason to wake the parent for each.
        print(json.dumps(message), file=messages, flush=message["kind"] != "clip")

    say({"kind": "ready"})
    for line in sys.stdin:
        _limit_cpu(cpu_seconds)
        _answer(json.loads(line), spool, say)


def _answer(request: dict[str, Any], spool: int, say: Say) -> None:
    """Takes one video to its end, or says whose fault it is that there is none."""
    try:
        _decode(request, spool, say)
    except VideoError as error:
        say({"kind": "video_fault", "cause": str(error)})
    except MemoryError:
        say({"kind": "video_fault", "cause": "memory limit reached"})
    except OSError as error:
        say({"kind": "environment_fault", "cause": f"{type(error).__name__}: {error}"})


def _decode(request: dict[str, Any], spool: int, say: Say) -> None:
    """Puts the clips of a video into the spool file and says where they are."""
    info = probe(request["path"], request["decoder"])
    say({"kind": "decoder", "name": info.decoder})
    rule, resolution, num_views = ClipRule(*request["rule"]), request["resolution"], request["views"]
    side = resolution if num_views == 1 else roomy(resolution)
    timed_frames = read_frames(
        request["path"], info, side, request["fit"], whole=num_views > 1, rgb_first=request["rgb_first"]
    )
    frames = _CountedFrames(timed_frames, say)
    cutter = ClipCutter(rule, info.fps)
    clip_fps = rule.fps or info.fps / rule.frame_stride
    codec, quality = request["encode"]
    end = num_needed_frames = 0
    for clip in cutter.cut(frames):
        num_needed_frames = max(num_needed_frames, clip.frame_numbers[-1] + 1)
        for number in range(num_views):
            key = f"{request['key']}:{clip.ordinal}:{number}"
            view = None
            pixels = clip.frames
            if num_views > 1:
                height, width = pixels.shape[1:3]
                view = draw_view(key, height, width, resolution, may_flip=request["flip"])
                pixels = take_view(pixels, view, resolution)
            data = _ENCODERS[codec](pixels, clip_fps, quality)
            _write_all(spool, data, end)
            say(
                {
                    "kind": "clip",
                    "ordinal": clip.ordinal,
                    "frame_numbers": clip.frame_numbers,
                    "start_seconds": clip.start_seconds,
                    "end_seconds": clip.end_seconds,
                    "fps": clip_fps,
                    "view": None if view is None else (number, view),
                    "offset": end,
                    "num_bytes": len(data),
                    "squared_error": _squared_error(codec, data, pixels) if is_measured(key) else None,
                    **_moments(pixels),
                }
            )
            end += len(data)
    if not frames.count:
        raise VideoError("no frame could be decoded")
    say(
        {
            "kind": "done",
            "info": asdict(info),
            "num_frames": frames.count,
            "truncated": cutter.num_kept != rule.max_clips
            and is_truncated(info, frames.count, frames.first_seconds, frames.last_seconds),
            "short": cutter.is_short,
            "num_static": cutter.num_static,
            "num_black": cutter.num_black,
            "num_needed_frames": num_needed_frames,
        }
    )


def _moments(pixels: np.ndarray) -> dict[str, int]:
    values = pixels.reshape(-1).astype(np.float64)  # exact: the sums stay far below 2**53
    return {"num_values": values.size, "pixel_sum": int(values.sum()), "pixel_square_sum": int(values @ values)}


def is_measured(key: str) -> bool:
    """One clip of sixteen, chosen by its key: decoding each would cost half as much as encoding it."""
    return hashlib.blake2b(f"measure:{key}".encode(), digest_size=1).digest()[0] < 16


def _squared_error(codec: str, data: bytes, pixels: np.ndarray) -> int | None:
    """Exact sum of the squared errors of a lossy clip; None for npy."""
    if codec not in _DECODERS:
        return None
    error = _DECODERS[codec](data).reshape(-1).astype(np.float64) - pixels.reshape(-1)
    return int(error @ error)


class _CountedFrames:
    """Passes frames on, counts them, and tells the parent now and then that there is progress."""

    def __init__(self, frames: Iterator[tuple[float, np.ndarray]], say: Say):
        self.count = 0
        self.first_seconds = self.last_seconds = 0.0
        self._frames = frames
        self._say = say
        self._said_at = 0.0

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        for timed_frame in self._frames:
            self.last_seconds = timed_frame[0]
            if not self.count:
                self.first_seconds = self.last_seconds
            self.count += 1
            now = time.monotonic()
            if now - self._said_at > _SECONDS_BETWEEN_SIGNS_OF_LIFE:
                self._say({"kind": "progress", "num_frames": self.count})
                self._said_at = now
            yield timed_frame


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """``pwrite`` until everything is written: a signal or a nearly full disk cuts it short."""
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, offset)
        view, offset = view[num_written:], offset + num_written


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies, whatever a decoder is doing then (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    """Limits the address space to ``memory_bytes`` beyond what is mapped now; a crash leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, mapped_bytes + memory_bytes)


def _limit_cpu(cpu_seconds: float) -> None:
    """Allows ``cpu_seconds`` more; SIGXCPU ends the process then."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + cpu_seconds))


def _limit(kind: int, soft: int) -> None:
    """Sets a soft limit, as far as the hard one allows."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
