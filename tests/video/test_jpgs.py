from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clipmill.video import decode_jpgs, encode_jpgs
from tests.video.test_encode import moving_disc, psnr


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 33, 47), (16, 64, 64)])
def test_every_frame_comes_back_at_any_size(shape):
    levels = np.linspace(0, 255, shape[0]).astype(np.uint8)
    clip = np.broadcast_to(levels[:, None, None, None], (*shape, 3))
    decoded = decode_jpgs(encode_jpgs(np.ascontiguousarray(clip), 95))
    assert decoded.dtype == np.uint8
    assert decoded.shape == clip.shape
    np.testing.assert_allclose(decoded.mean(axis=(1, 2, 3)), levels, atol=1)


def test_better_at_a_higher_quality():
    clip = moving_disc()
    good, coarse = (decode_jpgs(encode_jpgs(clip, quality)) for quality in (95, 30))
    assert psnr(clip, good) > 42
    assert psnr(clip, good) > psnr(clip, coarse) + 5


def test_the_layout_is_the_documented_one():
    data = encode_jpgs(moving_disc(3), 90)
    count, *lengths = np.frombuffer(data[:16], "<u4").tolist()
    assert count == 3
    first = Image.open(io.BytesIO(data[16 : 16 + lengths[0]]))
    assert (first.format, first.size) == ("JPEG", (64, 64))
    assert 16 + sum(lengths) == len(data)


def test_encoding_in_another_process_gives_the_same_bytes():
    program = (
        "import hashlib; from clipmill.video import encode_jpgs; from tests.video.test_encode import moving_disc;"
        "print(hashlib.sha256(encode_jpgs(moving_disc(), 95)).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)
    }
    assert len(outputs) == 1


def test_damaged_data_is_an_error_and_never_another_clip():
    data = encode_jpgs(moving_disc(), 95)
    for num_bytes in (0, 3, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="jpgs member"):
            decode_jpgs(data[:num_bytes])
    with pytest.raises(ValueError, match="damaged JPEG"):
        decode_jpgs(data[:68] + bytes(len(data) - 68))


def test_a_memoryview_is_enough():
    data = encode_jpgs(moving_disc(), 95)
    np.testing.assert_array_equal(decode_jpgs(memoryview(data)), decode_jpgs(data))
