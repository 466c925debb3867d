"""Frames of a video, strictly in order, resized by one resizer whichever decoder reads them.

Shapes: a frame is uint8 [H, W, 3], RGB; H = W = resolution.

Why strictly in order: seeking delivers wrong frames for several codecs, silently, in both decoders; reading everything
and taking every n-th frame never does. Why one resizer: decord's built-in one differs from swscale by up to 2.9 grey
levels. The pixels of a data set are a function of the files alone: PyAV's frames are converted and resized in one
step by swscale with fixed flags; where decord was asked for, which gives full-size RGB only, frames that PyAV has to
read go through the same full-size RGB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import av
import av.filter
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from clipmill.video.probe import VideoError, VideoInfo, blame_video, decoded_frames, open_video

__all__ = ["Fit", "is_truncated", "read_frames"]

Fit = Literal["crop", "pad", "stretch"]

# Area averaging keeps small frames free of ringing and is the quickest; without the full-chroma flags swscale would
# halve the colour resolution of RGB on the way. BITEXACT: the same pixels on every CPU.
_RESIZE = (
    Interpolation.AREA
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


def read_frames(
    path: str | Path, info: VideoInfo, resolution: int, fit: Fit, *, whole: bool = False, rgb_first: bool = False
) -> Iterator[tuple[float, np.ndarray]]:
    """Reads every frame of a video once, in presentation order.

    Args:
        path: local file.
        info: its probe, which fixes stream, rotation and decoder.
        resolution: height and width of the frames, in pixels.
        fit: ``crop``: resize the shorter side, centre crop. ``pad``: resize the longer side, pad with black.
            ``stretch``: both sides.
        whole: resize only, neither crop nor pad: the frames are then no squares.
        rgb_first: convert before resizing, as decord always does: costs time, and differs by some grey levels.

    Yields:
        (presentation time in seconds, uint8 [resolution, resolution, 3] RGB, turned upright).

    Raises:
        VideoError: a frame cannot be decoded.
    """
    resizer = _Resizer(info, resolution, fit, whole)
    frames = _read_decord(path, info) if info.decoder == "decord" else _read_pyav(path, info)
    to_rgb = VideoReformatter()
    previous = -np.inf
    for index, (time, frame) in enumerate(frames):
        # AVI and raw streams lack times here and there.
        if time is None or not previous < time < 1e9:
            time = previous + 1 / info.fps if index else 0.0
        previous = time
        yield time, resizer(to_rgb.reformat(frame, format="rgb24", threads=1) if rgb_first else frame)


def _read_pyav(path: str | Path, info: VideoInfo) -> Iterator[tuple[float | None, Any]]:
    """(time, `av.VideoFrame` as stored) by PyAV, one thread: the worker's cores run other workers."""
    with blame_video("cannot decode", path), open_video(path) as container:
        stream = container.streams[info.stream_index]
        stream.codec_context.thread_count = 1
        frames = decoded_frames(container, stream)
        if info.interlaced:
            frames = _deinterlaced(frames)
        # AVI stores no presentation times: what FFmpeg guesses of B-frames is out of order. One frame a packet it is.
        times = iter(_packet_times(path, info)) if info.container == "avi" else None
        for frame in frames:
            yield frame.time if times is None else next(times, None), frame


def _deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """One whole picture for each frame that weaves two moments; times and progressive frames stay as they are."""
    graph: Any = None
    shape = None
    for frame in frames:
        if shape != (frame.width, frame.height, frame.format.name):  # also where the picture changes on the way
            if graph is not None:
                yield from _filtered(graph, None)
            graph, shape = _deinterlacer(frame), (frame.width, frame.height, frame.format.name)
        yield from _filtered(graph, frame)
    if graph is not None:
        yield from _filtered(graph, None)


def _deinterlacer(frame: Any) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    bwdif, sink = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def _filtered(graph: Any, frame: Any) -> Iterator[Any]:
    """What the graph gives once it has a frame, or has got its last one (None)."""
    graph.push(frame)
    with suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()


def _read_decord(path: str | Path, info: VideoInfo) -> Iterator[tuple[float | None, Any]]:
    """(time, `av.VideoFrame` as stored) by decord."""
    import decord  # here: training workers decode clips without having decord installed

    decord.logging.set_level(decord.logging.ERROR)
    with blame_video("cannot decode", path):
        times = _packet_times(path, info)  # exact: decord's own are float32
        # A frame that fails is repeated from the last good one in silence, unless none may fail.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-6)
        if len(reader) != len(times):
            raise VideoError(f"decord counts {len(reader)} frames where the demuxer finds {len(times)}")
        for time in times:
            pixels = reader.next().asnumpy()
            # decord turns frames upright by itself where FFmpeg 4.1 knew rotation, in MP4 and MOV: back, so that one
            # place does it for both.
            if info.rotation and info.container.startswith("mov"):
                pixels = np.ascontiguousarray(np.rot90(pixels, -info.rotation // 90))
            yield time, av.VideoFrame.from_numpy_buffer(pixels, format="rgb24")


def _packet_times(path: str | Path, info: VideoInfo) -> list[float]:
    """Presentation times of all frames in seconds, in order, without decoding."""
    with open_video(path) as container:
        stream = container.streams[info.stream_index]
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        if info.decoder == "decord" and any(packet.is_corrupt for packet in packets):
            raise VideoError("damaged packets")
        ticks = sorted(packet.pts for packet in packets)
        return [float(tick * stream.time_base) for tick in ticks]


class _Resizer:
    """Turns decoded frames of one video into upright RGB squares, or upright whole frames."""

    def __init__(self, info: VideoInfo, resolution: int, fit: Fit, whole: bool):
        self._width, self._height = fitted_size(info.width, info.height, resolution, fit)
        self._resolution = None if whole else resolution
        self._quarter_turns = info.rotation // 90
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        """`av.VideoFrame` -> uint8 [resolution, resolution, 3], or the whole frame [h, w, 3]."""
        # Where the size is right already, nothing is done to the pixels.
        resized = self._reformatter.reformat(
            frame, width=self._width, height=self._height, format="rgb24", interpolation=_RESIZE, threads=1
        )
        pixels = resized.to_ndarray()
        if self._resolution is not None:
            pixels = _centre(pixels, self._resolution)
        return np.rot90(pixels, self._quarter_turns) if self._quarter_turns else pixels  # even of nothing it takes 3 us


def fitted_size(width: int, height: int, resolution: int, fit: Fit) -> tuple[int, int]:
    """(width, height) to which a frame is resized before it is cropped or padded to a square."""
    if fit == "stretch":
        return resolution, resolution
    side = min(width, height) if fit == "crop" else max(width, height)
    return max(1, round(width * resolution / side)), max(1, round(height * resolution / side))


def _centre(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Crops what is longer than ``resolution`` and pads what is shorter: [h, w, 3] -> [resolution, resolution, 3]."""
    height, width = pixels.shape[:2]
    top, left = max(0, height - resolution) // 2, max(0, width - resolution) // 2
    pixels = pixels[top : top + resolution, left : left + resolution]
    height, width = pixels.shape[:2]
    if (height, width) == (resolution, resolution):
        return pixels
    square = np.zeros((resolution, resolution, 3), np.uint8)
    top, left = (resolution - height) // 2, (resolution - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def is_truncated(info: VideoInfo, num_frames: int, first_seconds: float, last_seconds: float) -> bool:
    """Whether a video that was read to its end ended well before it should have.

    Truncated AVI, Matroska and WebM files end without an error. Both of the container's claims must be missed: an edit
    list cuts frames that the index still counts, and a duration may be that of a longer audio stream. Time is compared
    with time, since the average rate that a container states of a variable one may be far off. 2 % are forgiven.

    Args:
        info: the probe.
        num_frames: that were read.
        first_seconds: presentation time of the first of them.
        last_seconds: presentation time of the last.
    """
    missed = []
    if info.container_frames is not None:
        missed.append(num_frames < info.container_frames * 0.98 - 1)
    if info.duration_seconds is not None:
        # Some containers count their duration from zero, others from the first frame.
        covered = last_seconds - min(first_seconds, 0.0) + 1 / info.fps
        missed.append(covered < info.duration_seconds * 0.98 - 1 / info.fps)
    return bool(missed) and all(missed)
