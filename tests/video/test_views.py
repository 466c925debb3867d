from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from clipmill.config import ClipConfig
from clipmill.video import Decoder, Limits
from clipmill.video.views import draw_view, take_view, view_frame_size
from tests.video.conftest import make_video

VIEWS = ClipConfig(num_frames=4, resolution=28, views_per_clip=3)


def test_places_are_uniform_and_half_of_the_views_are_mirrored():
    views = [draw_view(f"seed:video:{n}", 34, 36, (32, 32), may_flip=True) for n in range(4500)]
    places = Counter((view.top, view.left) for view in views)
    assert set(places) == {(top, left) for top in range(3) for left in range(5)}
    assert all(abs(number - 300) < 90 for number in places.values())  # five standard deviations
    assert abs(sum(view.flipped for view in views) - 2250) < 170
    assert not any(draw_view(f"{n}", 34, 36, (32, 32), may_flip=False).flipped for n in range(50))


def test_a_view_is_the_same_part_of_every_frame():
    clip = np.random.default_rng(0).integers(0, 256, (3, 9, 12, 3), np.uint8)
    view = draw_view("key", 9, 12, (8, 8), may_flip=False)._replace(top=1, left=2)
    np.testing.assert_array_equal(take_view(clip, view, (8, 8)), clip[:, 1:9, 2:10])
    np.testing.assert_array_equal(take_view(clip, view._replace(flipped=True), (8, 8)), clip[:, 1:9, 9:1:-1])
    np.testing.assert_array_equal(take_view(clip, view, (5, 10)), clip[:, 1:6, 2:12])


def decoded(path, key, clip=VIEWS):
    with Decoder(Limits(60, 2**30, 60)) as decoder:
        return list(decoder.clips(path, clip, encode=("npy", None), key=key))


@pytest.mark.parametrize("rotation", [0, 90])
def test_views_are_squares_of_the_whole_frames_a_function_of_their_key(tmp_path, rotation):
    path = make_video(tmp_path / "turned.mp4", num_frames=12, size=(96, 64), rotation=rotation)
    clips = decoded(path, "0:a")
    assert [(clip.ordinal, clip.view[0]) for clip in clips] == [(c, v) for c in range(3) for v in range(3)]
    short, _ = view_frame_size((28, 28))
    long = short * 96 // 64
    assert {(clip.view[1].height, clip.view[1].width) for clip in clips} == {
        (long, short) if rotation else (short, long)
    }
    whole = {clip.ordinal: clip for clip in decoded(path, "0:a", ClipConfig(num_frames=4, resolution=32, fit="crop"))}
    assert all(clip.frame_numbers == whole[clip.ordinal].frame_numbers for clip in clips)
    again, other = decoded(path, "0:a"), decoded(path, "1:a")
    assert [clip.view for clip in again] == [clip.view for clip in clips] != [clip.view for clip in other]
    for one, two in zip(clips, again, strict=True):
        np.testing.assert_array_equal(one.data, two.data)


@pytest.mark.parametrize(("size", "cut_from"), [((21, 42), (32, 48)), ((42, 21), (48, 72)), ((28, 42), (32, 48))])
def test_views_of_a_rectangle_leave_an_eighth_in_both_axes(tmp_path, size, cut_from):
    path = make_video(tmp_path / "wide.mp4", num_frames=4, size=(96, 64))
    clips = decoded(path, "0:a", ClipConfig(num_frames=4, resolution=size, views_per_clip=20))
    assert {clip.data.shape for clip in clips} == {(4, *size, 3)}
    assert {(clip.view[1].height, clip.view[1].width) for clip in clips} == {cut_from}
    for axis, name in enumerate(("top", "left")):
        places = {getattr(clip.view[1], name) for clip in clips}
        assert len(places) > 2
        assert max(places) <= cut_from[axis] - size[axis]
