from __future__ import annotations

import io

import av
import numpy as np

from clipmill.video import decode_mp4
from clipmill.video.pictures import contact_sheet, playing_row, png_bytes


def read_png(data):
    with av.open(io.BytesIO(data)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_png_is_lossless_and_reproducible():
    picture = noise(31, 45, 3)
    data = png_bytes(picture)
    assert data.startswith(b"\x89PNG")
    assert data == png_bytes(picture)
    np.testing.assert_array_equal(read_png(data), picture)


def test_a_sheet_shows_first_and_last_frame_of_each_clip():
    clips = noise(3, 16, 10, 12, 3)
    sheet = read_png(contact_sheet(clips))
    assert sheet.shape == (3 * 10 + 2 * 2, 8 * 12 + 7 * 2, 3)
    np.testing.assert_array_equal(sheet[:10, :12], clips[0, 0])
    np.testing.assert_array_equal(sheet[-10:, -12:], clips[2, 15])
    assert (sheet[10:12] == 255).all()


def test_a_sheet_of_short_clips_has_as_many_columns_as_frames():
    assert read_png(contact_sheet(noise(1, 3, 8, 8, 3))).shape == (8, 3 * 8 + 2 * 2, 3)


def test_a_row_plays_all_clips_side_by_side_enlarged():
    levels = np.array([40, 120, 200], np.uint8)
    clips = np.broadcast_to(levels[:, None, None, None, None], (3, 5, 9, 9, 3))
    row = decode_mp4(playing_row(clips, fps=10, scale=3, gap=4))
    assert row.shape == (5, 28, 90, 3)  # 27 and 89, made even
    for level, left in zip(levels, (0, 31, 62), strict=True):
        np.testing.assert_allclose(row[:, 4:23, left + 4 : left + 23], level, atol=4)
