"""A file that is much larger than the memory its reader may have."""

from __future__ import annotations

import re
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from clipmill.config import ClipConfig
from clipmill.video import Decoder, Limits

FPS = 10
GIGABYTE = 10**9
PACKET_BYTES = 70_000
"""Two hours of such packets at this rate are 5 GB."""


def write_avi(path: Path, num_frames: int) -> None:
    """1080p in MPEG-4: a grey picture every second, packets without change between, all padded to one size."""
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 1920, 1080, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, FPS), FPS, FPS
    picture = av.VideoFrame.from_ndarray(np.full((1080, 1920, 3), 90, np.uint8), format="rgb24")
    second = []
    for index in range(FPS):
        picture.pts, picture.time_base = index, Fraction(1, FPS)
        second += encoder.encode(picture)
    second += encoder.encode(None)
    # A decoder looks for start codes only, which zeros are not.
    payloads = [bytes(packet).ljust(PACKET_BYTES, b"\0") for packet in second]
    with av.open(str(path), "w") as container:
        stream = container.add_mux_stream("mpeg4", rate=FPS, width=1920, height=1080, time_base=Fraction(1, FPS))
        for index in range(num_frames):
            packet = av.Packet(payloads[index % FPS])
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, FPS), index % FPS == 0
            packet.pts = packet.dts = index
            container.mux(packet)


def read(path: Path, span: tuple[float | None, float | None] = (None, None)) -> tuple[int, bool, int]:
    """(frames, whether the file counts as truncated, most bytes that the reader had in memory) of a file."""
    clip = ClipConfig(num_frames=16, resolution=16, fit="stretch")
    before = set(psutil.Process().children())
    with Decoder(Limits(cpu_seconds=3600, memory_bytes=GIGABYTE, no_progress_seconds=300)) as decoder:
        num_clips = sum(1 for _ in decoder.clips(path, clip, encode=("npy", None), span=span))
        (child,) = set(psutil.Process().children()) - before
        (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
        assert decoder.outcome is not None
        assert num_clips == decoder.outcome.num_frames // 16
        return decoder.outcome.num_frames, decoder.outcome.truncated, 1024 * int(kilobytes)


@pytest.fixture
def folder(tmp_path):
    """Emptied at once: pytest keeps the folders of its last runs."""
    if shutil.disk_usage(tmp_path).free < 6 * GIGABYTE:
        pytest.skip("needs 6 GB of disk space")
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_two_hour_avi_of_five_gigabytes_is_read_in_one(folder):
    minute, two_hours = folder / "minute.avi", folder / "two_hours.avi"
    write_avi(minute, 60 * FPS)
    write_avi(two_hours, 2 * 3600 * FPS)
    assert two_hours.stat().st_size > 5 * GIGABYTE
    *_, bytes_of_a_minute = read(minute)
    num_frames, is_truncated, num_bytes = read(two_hours)
    assert (num_frames, is_truncated) == (2 * 3600 * FPS, False)
    assert num_bytes < GIGABYTE
    assert num_bytes - bytes_of_a_minute < 0.05 * GIGABYTE
    num_frames, _, num_bytes = read(two_hours, span=(7100.0, None))
    assert num_frames == 100 * FPS
    assert num_bytes < GIGABYTE
