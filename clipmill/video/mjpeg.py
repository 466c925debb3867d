"""Clips as MJPEG in Matroska, and back: every frame is a separate JPEG file of any size.

The packets of the file are the JPEG files byte for byte, so ``ffmpeg``, PyAV and OpenCV read it. The bytes are a
function of (frames, fps, quality, library versions). libjpeg-turbo rounds identically with all vector instructions, and
the muxer's bit-exact mode writes no random numbers, times or version strings.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from clipmill.video.encode import DEMUXER_OPTIONS, SecondReader, check_frames

__all__ = ["decode_mjpeg", "encode_mjpeg"]

# With the index in front, the file ends with its last frame, so truncated data always lacks a frame.
_MUXER_OPTIONS = {"fflags": "+bitexact", "cues_to_front": "1"}
_NUM_FRAMES_TAG = "NUMBER_OF_FRAMES"
"""Tag with the number of frames, named as in mkvmerge. Matroska itself has no such field."""


def encode_mjpeg(frames: np.ndarray, fps: float, quality: int) -> bytes:
    """Encodes a clip as a reproducible Matroska file of JPEG pictures (4:4:4, full range).

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        fps: frames per second. Matroska rounds the times of frames to milliseconds.
        quality: libjpeg's, 1 to 95; higher is better and larger.

    Raises:
        ValueError: another dtype or shape.
    """
    check_frames(frames)
    rate = Fraction(fps).limit_denominator(60_000)
    file = io.BytesIO()
    # To move the index to the front, the muxer opens its own output a second time, for reading.
    with av.open(
        file, "w", format="matroska", options=_MUXER_OPTIONS, io_open=lambda *_: SecondReader(file)
    ) as container:
        height, width = frames.shape[1:3]
        stream = container.add_mux_stream("mjpeg", rate=rate, width=width, height=height)
        stream.metadata[_NUM_FRAMES_TAG] = str(len(frames))
        for index, frame in enumerate(frames):
            picture = io.BytesIO()
            # 4:4:4: frames of 64 pixels have no colour resolution to spare.
            Image.fromarray(frame).save(picture, "JPEG", quality=quality, subsampling=0)
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, 1 / rate, True
            packet.pts = packet.dts = index
            packet.duration = 1
            container.mux(packet)
    return file.getvalue()


def decode_mjpeg(data: bytes | memoryview) -> np.ndarray:
    """Decodes a file of `encode_mjpeg` with Pillow. FFmpeg's own MJPEG decoder differs by up to 3 grey levels.

    Returns:
        uint8 [T, H, W, 3], RGB.

    Raises:
        ValueError: the data was cut, or is not a Matroska file of JPEG pictures of one size.
    """
    try:
        with av.open(io.BytesIO(data), "r", format="matroska", options=DEMUXER_OPTIONS) as container:
            stream = container.streams.video[0]
            num_frames = int(stream.metadata[_NUM_FRAMES_TAG])
            pictures = [bytes(packet) for packet in container.demux(stream) if packet.size]
        if len(pictures) != num_frames:
            raise ValueError(f"it declares {num_frames} frames and holds {len(pictures)}")
        return np.stack([np.asarray(Image.open(io.BytesIO(picture), formats=["JPEG"])) for picture in pictures])
    except (av.FFmpegError, OSError, LookupError, ValueError) as error:  # Pillow raises OSError for damaged pictures
        raise ValueError(f"no whole MJPEG clip: {error}") from error
