"""Videos that the tests make themselves: every frame carries its number as a barcode."""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

needs_decord = pytest.mark.skipif(find_spec("decord") is None, reason="decord (decord2 on aarch64) is not installed")

NUM_BITS = 8


def barcode(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: eight bars, left to right from the highest bit, white for one."""
    bits = [(number >> bit) & 1 for bit in reversed(range(NUM_BITS))]
    bars = np.array([bits[x * NUM_BITS // width] for x in range(width)], np.uint8) * 255
    return np.broadcast_to(bars[None, :, None], (height, width, 3)).copy()


def read_barcode(frame: np.ndarray) -> int:
    """The number in a stretched frame, uint8 [H, W, 3]."""
    width = frame.shape[1]
    centres = [(2 * bit + 1) * width // (2 * NUM_BITS) for bit in range(NUM_BITS)]
    row = frame[frame.shape[0] // 2].mean(axis=1)
    return int("".join("1" if row[x] > 127 else "0" for x in centres), 2)


def make_video(
    path: Path,
    codec: str = "libx264",
    *,
    num_frames: int = 40,
    size: tuple[int, int] = (96, 64),
    fps: int = 10,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    matrix: tuple[int, int, int, int] | None = None,
    sample_aspect: Fraction | None = None,
    num_streams: int = 1,
    pts: list[int] | None = None,
    container_options: dict[str, str] | None = None,
    tag: str | None = None,
) -> Path:
    """Writes barcodes 0, 1, ... of size (width, height); stream s of several counts from 100 * s.

    ``matrix`` is (a, b, c, d): a player shows the stored point (x, y) at (a x + c y, b x + d y), up to a shift.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        streams = []
        for _ in range(num_streams):
            stream = container.add_stream(codec, rate=fps, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
            if tag:
                stream.codec_context.codec_tag = tag
            if rotation:
                stream.set_display_rotation(rotation)
            if matrix:
                a, b, c, d = (65536 * sign for sign in matrix)
                stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
            if sample_aspect:
                stream.codec_context.sample_aspect_ratio = sample_aspect
            streams.append(stream)
        for index in range(num_frames):
            for number, stream in enumerate(streams):
                frame = av.VideoFrame.from_ndarray(barcode(index + 100 * number, *size), format="rgb24")
                frame.pts, frame.time_base = (pts[index] if pts else index), Fraction(1, fps)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return path


def state_display_width(path: Path, width: int) -> None:
    """Adds the element DisplayWidth to the only track of a WebM file, and shortens the padding before the tracks."""
    data = bytearray(path.read_bytes())
    element = b"\x54\xb0\x82" + width.to_bytes(2, "big")
    tracks = data.index(b"\x16\x54\xae\x6b", data.index(b"\x15\x49\xa9\x66\xb2"))
    video = data.index(b"\xe0\x86\xb0", tracks)
    # the last bytes of the sizes of: all tracks, this track, its picture
    for place in (tracks + 4, tracks + 13, video + 1):
        data[place] += len(element)
    data[video + 2 : video + 2] = element
    padding = data.index(b"\xec\x01\0\0\0\0\0\0")
    data[padding + 8] -= len(element)
    del data[padding + 9 : padding + 9 + len(element)]
    path.write_bytes(data)


def state_pixel_aspect(path: Path, across: int, down: int) -> None:
    """Overwrites the box ``pasp`` of an MP4 file."""
    data = bytearray(path.read_bytes())
    place = data.index(b"pasp") + 4
    data[place : place + 8] = across.to_bytes(4, "big") + down.to_bytes(4, "big")
    path.write_bytes(data)


def make_edited(path: Path, source: Path, shift_seconds: float) -> Path:
    """Remuxes with all times earlier: the muxer writes an edit list that cuts the frames before zero."""
    with av.open(str(source)) as reading, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        for packet in reading.demux(stream):
            if packet.dts is None:
                continue
            ticks = round(shift_seconds / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
            writing.mux(packet)
    return path


def make_sound(path: Path) -> Path:
    """Half a second of silence, no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
