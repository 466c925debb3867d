"""Clips as small h264 mp4 files, and back.

The bytes of an mp4 are a function of (frames, fps, crf, library versions, CPU instruction class). The bytes that x264
writes depend on its number of threads, so it gets one; muxer and codec run in their bit-exact modes. Colours are tagged
BT.709, limited range, and both directions convert with exactly these tags.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

__all__ = ["DEMUXER_OPTIONS", "SecondReader", "check_frames", "decode_mp4", "encode_mp4", "write_raw_video"]

_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
_ENCODER_OPTIONS = {
    "preset": "veryfast",  # "medium" takes three times as long and saves 4 % of the bytes of a 64 x 64 clip
    "g": "8",
    "bf": "0",  # B-frames would need an edit list, which some readers mishandle
    "sc_threshold": "0",
    "threads": "1",
    # With its macroblock tree, x264 wrote different bytes for the same frames in 1 to 2 % of clips of 32 and 48 pixels
    # (0 of 2,850 encodes without it). Clips of one GOP gain little from it. swscale centres each chroma sample on its
    # four pixels. Readers of h264 assume it at their left edge unless the stream says otherwise (chromaloc=1), and then
    # shift all colours by half a pixel.
    "x264-params": "mbtree=0:chromaloc=1",
}
DEMUXER_OPTIONS = {"probesize": "32", "analyzeduration": "0"}
"""Limits for the demuxer, which would otherwise decode frames to guess their format. The headers of our own files are
complete.
"""


class SecondReader:
    """Reads a file in memory from a position of its own while a muxer writes it."""

    def __init__(self, file: io.BytesIO):
        self._file = file
        self._position = 0

    def read(self, num_bytes: int) -> bytes:
        """At most ``num_bytes`` from the current position on."""
        data = bytes(self._file.getbuffer()[self._position : self._position + num_bytes])
        self._position += len(data)
        return data

    def close(self) -> None:
        """Does nothing: the file belongs to its writer."""


def check_frames(frames: np.ndarray) -> None:
    """Raises ValueError for anything but uint8 [T, H, W, 3] with T > 0."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T > 0, not {frames.dtype} {list(frames.shape)}")


def encode_mp4(frames: np.ndarray, fps: float, crf: int) -> bytes:
    """Encodes a clip as a reproducible h264 mp4 file that browsers play.

    Args:
        frames: uint8 [T, H, W, 3], RGB; H and W even (yuv420p halves the colour axes).
        fps: frames per second.
        crf: constant rate factor, 0 to 51; lower is better and larger.

    Raises:
        ValueError: another dtype or shape, or an odd size.
    """
    check_frames(frames)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"h264 clips need an even height and width, not {height} x {width}")
    file = io.BytesIO()
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    # To move the header to the front, the muxer opens its own output a second time, for reading.
    with av.open(file, "w", format="mp4", options=options, io_open=lambda *_: SecondReader(file)) as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(60_000), options={**_ENCODER_OPTIONS, "crf": str(crf)}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        reformatter = VideoReformatter()
        for index, pixels in enumerate(frames):
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
                threads=1,
            )
            frame.pts, frame.time_base = index, 1 / stream.codec_context.framerate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def decode_mp4(data: bytes | memoryview) -> np.ndarray:
    """Decodes a file of `encode_mp4`.

    Returns:
        uint8 [T, H, W, 3], RGB: every frame, in presentation order.

    Raises:
        ValueError: not a video, or fewer frames than its header declares (the data was cut).
    """
    with av.open(io.BytesIO(data), "r", format="mp4", options=DEMUXER_OPTIONS) as container:
        stream = container.streams.video[0]
        # Frame threads cost more to start than a clip takes to decode.
        stream.codec_context.thread_count = 1
        num_frames, height, width = stream.frames, stream.height, stream.width
        clip = np.empty((num_frames, height, width, 3), np.uint8)
        reformatter = VideoReformatter()
        decoded = 0
        for frame in container.decode(stream):
            rgb = reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
                threads=1,
            )
            if decoded < num_frames:
                clip[decoded] = rgb.to_ndarray()
            decoded += 1
    if decoded != num_frames:
        raise ValueError(f"the mp4 declares {num_frames} frames and holds {decoded}")
    return clip


def write_raw_video(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes frames without compression, so that every video reader returns them bit for bit.

    Args:
        path: local file, overwritten.
        frames: uint8 [T, H, W, 3], RGB.
        fps: frames per second.
    """
    rate = Fraction(fps).limit_denominator(60_000)
    with av.open(str(path), "w", format="nut") as container:
        stream = container.add_stream("rawvideo", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
