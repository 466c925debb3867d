from __future__ import annotations

import io
import subprocess
import sys

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.video import decode_mp4, encode_mp4


def moving_disc(num_frames=16, size=64):
    y, x = np.mgrid[:size, :size]
    frames = np.empty((num_frames, size, size, 3))
    for t in range(num_frames):
        coverage = np.clip(size / 5 - np.hypot(x - size / 3 - t, y - size / 2) + 0.5, 0, 1)[..., None]
        frames[t] = (1 - coverage) * (40, 50, 60) + coverage * (200, 210, 190)
    return frames.round().astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_colours_stay_where_they_are():
    x = np.linspace(0, 6 * np.pi, 64)
    colour = np.stack([np.sin(x), np.sin(x + 2), np.sin(x + 4)], axis=-1)
    clip = np.broadcast_to(128 + 80 * colour, (4, 64, 64, 3)).round().astype(np.uint8)
    # Chroma that is read half a pixel away gives 28 dB.
    assert psnr(clip, decode_mp4(encode_mp4(clip, 10, 4))) > 40


def test_encoding_twice_gives_the_same_bytes_also_in_another_process():
    clip = moving_disc()
    data = encode_mp4(clip, 12.5, 16)
    assert encode_mp4(clip, 12.5, 16) == data
    program = (
        "import hashlib; from tests.video.test_encode import *;"
        "print(hashlib.sha256(encode_mp4(moving_disc(), 12.5, 16)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    import hashlib

    assert other.stdout.strip() == hashlib.sha256(data).hexdigest()


def test_round_trip_is_faithful_and_better_at_a_lower_crf():
    clip = moving_disc()
    good, coarse = (decode_mp4(encode_mp4(clip, 10, crf)) for crf in (10, 40))
    assert good.dtype == np.uint8
    assert psnr(clip, good) > 36
    assert psnr(clip, good) > psnr(clip, coarse) + 3


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 140, 200)])
def test_flat_colours_survive(colour):
    clip = np.full((4, 32, 32, 3), colour, np.uint8)
    assert np.abs(decode_mp4(encode_mp4(clip, 10, 4)).astype(int) - clip).max() <= 3


@settings(max_examples=20)
@given(
    num_frames=st.integers(1, 40),
    height=st.integers(8, 40).map(lambda n: 2 * n),
    width=st.integers(8, 40).map(lambda n: 2 * n),
    fps=st.floats(0.5, 120),
)
def test_every_frame_comes_back(num_frames, height, width, fps):
    levels = np.linspace(0, 255, num_frames).astype(np.uint8)
    clip = np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))
    decoded = decode_mp4(encode_mp4(clip, fps, 16))
    assert decoded.shape == clip.shape
    np.testing.assert_allclose(decoded.mean(axis=(1, 2, 3)), levels, atol=4)


def test_the_file_says_what_players_need():
    data = encode_mp4(moving_disc(), 12.5, 16)
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
        assert stream.start_time == 0
        assert sum(packet.is_keyframe for packet in container.demux(stream)) == 2  # a short group of pictures


def test_cut_data_is_an_error_and_never_a_shorter_clip():
    data = encode_mp4(moving_disc(), 10, 16)
    for num_bytes in (0, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"."):
            decode_mp4(data[:num_bytes])


def test_a_memoryview_is_enough():
    data = encode_mp4(moving_disc(), 10, 16)
    np.testing.assert_array_equal(decode_mp4(memoryview(data)), decode_mp4(data))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((4, 15, 16, 3), np.uint8),
        np.zeros((4, 16, 16), np.uint8),
        np.zeros((4, 16, 16, 3), np.float32),
    ],
)
def test_what_h264_cannot_hold_is_refused(frames):
    with pytest.raises(ValueError, match=r"frames must be|even height"):
        encode_mp4(frames, 10, 16)
