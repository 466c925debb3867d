"""Frames of a video, strictly in order, resized by one resizer whichever decoder reads them; and clips of frames.

Shapes: a frame is uint8 [H, W, 3], RGB; a clip is uint8 [T, H, W, 3]; H = W = resolution.

Why strictly in order: seeking delivers wrong frames for several codecs, silently, in both decoders; reading everything
and taking every n-th frame never does. Why one resizer: decord's built-in one differs from swscale by up to 2.9 grey
levels. The pixels are a function of the file alone: both decoders convert small frames to the same full-size RGB, and
swscale with fixed flags makes it smaller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from clipmill.video.probe import SMALL_FRAME_PIXELS, VideoError, VideoInfo, blame_video, open_video

__all__ = ["ClipFrames", "ClipRule", "Fit", "cut_clips", "is_truncated", "read_frames"]

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


class ClipRule(NamedTuple):
    """Which frames become a clip: `clipmill.config.ClipConfig` without its defaults."""

    num_frames: int
    frame_stride: int
    step: int
    max_clips: int | None

    @property
    def span(self) -> int:
        """Frames of the video that one clip covers."""
        return (self.num_frames - 1) * self.frame_stride + 1


@dataclass(frozen=True)
class ClipFrames:
    """A complete clip: its place in the video and its pixels, uint8 [T, H, W, 3]."""

    ordinal: int
    first_frame: int
    start_seconds: float
    end_seconds: float
    frames: np.ndarray


def read_frames(path: str | Path, info: VideoInfo, resolution: int, fit: Fit) -> Iterator[tuple[float, np.ndarray]]:
    """Reads every frame of a video once, in presentation order.

    Args:
        path: local file.
        info: its probe, which fixes stream, rotation and decoder.
        resolution: height and width of the frames, in pixels.
        fit: ``crop``: resize the shorter side, centre crop. ``pad``: resize the longer side, pad with black.
            ``stretch``: both sides.

    Yields:
        (presentation time in seconds, uint8 [resolution, resolution, 3] RGB, turned upright).

    Raises:
        VideoError: a frame cannot be decoded.
    """
    resizer = _Resizer(info, resolution, fit)
    read = _read_decord if info.decoder == "decord" else _read_pyav
    previous = -np.inf
    for index, (time, frame) in enumerate(read(path, info)):
        # AVI and raw streams lack times here and there.
        if time is None or not previous < time < 1e9:
            time = previous + 1 / info.fps if index else 0.0
        previous = time
        yield time, resizer(frame)


def _read_pyav(path: str | Path, info: VideoInfo) -> Iterator[tuple[float | None, Any]]:
    """(time, `av.VideoFrame` as stored) by PyAV, one thread: the worker's cores run other workers."""
    reformatter = VideoReformatter()
    with blame_video("cannot decode"), open_video(path) as container:
        stream = container.streams[info.stream_index]
        stream.codec_context.thread_count = 1
        for frame in _decoded(container, stream):
            if frame.width * frame.height <= SMALL_FRAME_PIXELS:
                # The same full-size RGB as decord's. Large frames are never decord's: one conversion does it all.
                yield frame.time, reformatter.reformat(frame, format="rgb24", threads=1)
            else:
                yield frame.time, frame


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """All frames of a stream up to the first damaged packet, of which a decoder would make a frame up."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            yield from stream.decode()  # what the decoder holds back for reordering
            return
        yield from packet.decode()  # the last packet is empty and does the same


def _read_decord(path: str | Path, info: VideoInfo) -> Iterator[tuple[float | None, Any]]:
    """(time, `av.VideoFrame` as stored) by decord."""
    import decord  # here: training workers decode clips without having decord installed

    decord.logging.set_level(decord.logging.ERROR)
    with blame_video("cannot decode"):
        times = _packet_times(path, info)  # exact: decord's own are float32
        # A frame that fails is repeated from the last good one in silence, unless none may fail.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-6)
        if len(reader) != len(times):
            raise VideoError(f"decord counts {len(reader)} frames where the demuxer finds {len(times)}")
        for time in times:
            pixels = reader.next().asnumpy()
            if info.rotation:  # decord turns frames upright by itself: back, so that one place does it for both
                pixels = np.ascontiguousarray(np.rot90(pixels, -info.rotation // 90))
            yield time, av.VideoFrame.from_numpy_buffer(pixels, format="rgb24")


def _packet_times(path: str | Path, info: VideoInfo) -> list[float]:
    """Presentation times of all frames in seconds, in order, without decoding."""
    with open_video(path) as container:
        stream = container.streams[info.stream_index]
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        if any(packet.is_corrupt for packet in packets):
            raise VideoError("damaged packets")
        ticks = sorted(packet.pts for packet in packets)
        return [float(tick * stream.time_base) for tick in ticks]


class _Resizer:
    """Turns decoded frames of one video into upright RGB squares."""

    def __init__(self, info: VideoInfo, resolution: int, fit: Fit):
        self._width, self._height = fitted_size(info.width, info.height, resolution, fit)
        self._resolution = resolution
        self._quarter_turns = info.rotation // 90
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        """`av.VideoFrame` -> uint8 [resolution, resolution, 3]."""
        # Where the size is right already, nothing is done to the pixels.
        resized = self._reformatter.reformat(
            frame, width=self._width, height=self._height, format="rgb24", interpolation=_RESIZE, threads=1
        )
        pixels = _centre(resized.to_ndarray(), self._resolution)
        return np.ascontiguousarray(np.rot90(pixels, self._quarter_turns))


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


def cut_clips(frames: Iterable[tuple[float, np.ndarray]], rule: ClipRule, fps: float) -> Iterator[ClipFrames]:
    """Cuts a stream of frames into complete clips that start at frames 0, step, 2 * step, ...

    Stops reading after ``rule.max_clips``. Holds the frames that one clip spans, so clips may overlap.
    """
    recent: deque[tuple[float, np.ndarray]] = deque(maxlen=rule.span)
    ordinal = 0
    for index, timed_frame in enumerate(frames):
        recent.append(timed_frame)
        first_frame = index - rule.span + 1
        if first_frame < 0 or first_frame % rule.step:
            continue
        chosen = list(recent)[:: rule.frame_stride]
        yield ClipFrames(
            ordinal=ordinal,
            first_frame=first_frame,
            start_seconds=chosen[0][0],
            end_seconds=chosen[-1][0] + 1 / fps,
            frames=np.stack([frame for _, frame in chosen]),
        )
        ordinal += 1
        if ordinal == rule.max_clips:
            return


def is_truncated(info: VideoInfo, num_frames: int) -> bool:
    """Whether a video that was read to its end ended well before it should have.

    Truncated AVI, Matroska and WebM files end without an error. The smaller of the container's two claims counts: an
    edit list cuts frames that the index still counts, and a duration may be that of a longer audio stream. 2 % are
    forgiven: the average rate of a video with variable frame rate is an estimate.
    """
    claims = [] if info.container_frames is None else [float(info.container_frames)]
    if info.duration_seconds is not None:
        claims.append(info.duration_seconds * info.fps)
    return bool(claims) and num_frames < min(claims) * 0.98 - 1
