from __future__ import annotations

import io
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from clipmill.video import decode_mjpeg, encode_mjpeg
from tests.video.test_encode import moving_disc, psnr


def jpeg_files(clip: np.ndarray, quality: int) -> list[bytes]:
    files = [io.BytesIO() for _ in clip]
    for file, frame in zip(files, clip, strict=True):
        Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0)
    return [file.getvalue() for file in files]


def packets(data: bytes) -> list[av.Packet]:
    with av.open(io.BytesIO(data)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 33, 47), (3, 1, 1), (16, 36, 64)])
def test_packets_are_the_jpeg_files_and_pixels_are_theirs(shape):
    clip = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    files = jpeg_files(clip, 95)
    data = encode_mjpeg(clip, 10, 95)
    assert [bytes(packet) for packet in packets(data)] == files
    expected = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    np.testing.assert_array_equal(decode_mjpeg(data), expected)


def test_better_at_a_higher_quality():
    clip = moving_disc()
    good, coarse = (decode_mjpeg(encode_mjpeg(clip, 10, quality)) for quality in (95, 30))
    assert psnr(clip, good) > 42
    assert psnr(clip, good) > psnr(clip, coarse) + 5


@pytest.mark.parametrize("fps", [0.25, 10, 24000 / 1001, 30, 60, 1000])
def test_other_readers_see_the_rate_the_times_and_the_pixels(fps):
    clip = moving_disc()
    data = encode_mjpeg(clip, fps, 95)
    rate = Fraction(fps).limit_denominator(60_000)
    with av.open(io.BytesIO(data)) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "mjpeg"
        assert stream.average_rate == rate
        assert container.duration / av.time_base == pytest.approx(len(clip) / rate, abs=0.002)
        frames = list(container.decode(stream))
    assert [frame.time for frame in frames] == pytest.approx([index / rate for index in range(len(clip))], abs=0.00051)
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    error = np.abs(pixels.astype(int) - decode_mjpeg(data))
    assert error.mean() < 0.1
    assert error.max() <= 3


def test_any_frame_can_be_sought():
    data = encode_mjpeg(moving_disc(), 10, 95)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        container.seek(700, stream=stream)
        assert next(container.demux(stream)).pts == 700


def test_encoding_later_and_in_another_process_gives_the_same_bytes():
    program = (
        "import hashlib, time; from tests.video.test_mjpeg import encode_mjpeg, moving_disc;"
        "first = encode_mjpeg(moving_disc(), 10, 95); time.sleep(1.1);"
        "assert encode_mjpeg(moving_disc(), 10, 95) == first; print(hashlib.sha256(first).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)
    }
    assert len(outputs) == 1


def test_data_cut_anywhere_is_an_error():
    data = encode_mjpeg(moving_disc(4), 10, 50)
    for num_bytes in range(len(data)):
        with pytest.raises(ValueError, match="no whole MJPEG clip"):
            decode_mjpeg(data[:num_bytes])


def test_a_damaged_picture_is_an_error():
    data = encode_mjpeg(moving_disc(4), 10, 50)
    header = jpeg_files(moving_disc(4), 50)[2][:40]
    assert header in data
    with pytest.raises(ValueError, match="no whole MJPEG clip: cannot identify"):
        decode_mjpeg(data.replace(header, bytes(40)))


def test_a_memoryview_is_enough():
    data = encode_mjpeg(moving_disc(), 10, 95)
    np.testing.assert_array_equal(decode_mjpeg(memoryview(data)), decode_mjpeg(data))


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\]"):
        encode_mjpeg(np.zeros((4, 8, 8, 3), np.float32), 10, 95)
