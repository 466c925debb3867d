from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clipmill.config import ClipConfig
from clipmill.video.clips import ClipCutter, ClipRule


def grey(levels, times=None, fps=10):
    """Timed frames of one grey level each."""
    times = [index / fps for index in range(len(levels))] if times is None else times
    return [(time, np.full((2, 2, 3), level, np.uint8)) for time, level in zip(times, levels, strict=True)]


def numbers(rule, frames, fps=10):
    return [clip.frame_numbers for clip in ClipCutter(rule, fps).cut(frames)]


@given(
    num_frames=st.integers(1, 6),
    stride=st.integers(1, 4),
    step=st.integers(1, 12),
    max_clips=st.none() | st.integers(1, 4),
    length=st.integers(0, 60),
)
def test_clips_are_what_the_rule_says(num_frames, stride, step, max_clips, length):
    rule = ClipRule(num_frames, stride, step, max_clips)
    cutter = ClipCutter(rule, fps=10)
    clips = list(cutter.cut(grey(range(length))))
    starts = [start for start in range(0, length, step) if start + (num_frames - 1) * stride < length][:max_clips]
    assert [clip.frame_numbers[0] for clip in clips] == starts
    assert [clip.ordinal for clip in clips] == list(range(len(starts)))
    assert cutter.is_short == (not starts)
    for clip, start in zip(clips, starts, strict=True):
        assert list(clip.frame_numbers) == [start + i * stride for i in range(num_frames)]
        assert clip.frames[:, 0, 0, 0].tolist() == list(clip.frame_numbers)
        assert clip.start_seconds == start / 10
        assert clip.end_seconds == pytest.approx((start + (num_frames - 1) * stride + 1) / 10)


@given(
    gaps=st.lists(st.integers(10, 3000), max_size=40),
    start=st.integers(-500, 5000),
    fps=st.sampled_from([0.5, 3, 7, 10, 24, 60]),
)
def test_resampling_shows_the_newest_frame_at_each_tick(gaps, start, fps):
    times = start / 1000 + np.cumsum([0, *gaps]) / 1000
    rule = ClipRule(num_frames=1, frame_stride=1, step=1, fps=fps)
    clips = list(ClipCutter(rule, fps=10).cut(grey(range(len(times)), times)))
    end = times[-1] + 0.1  # the last frame is shown for 1 / 10 s
    ticks = [times[0] + k / fps for k in range(int((end - times[0]) * fps) + 2)]
    ticks = [tick for tick in ticks if tick < end - 0.001]
    assert [clip.frame_numbers[0] for clip in clips] == [max(np.flatnonzero(times <= t + 0.001)) for t in ticks]
    np.testing.assert_allclose([clip.start_seconds for clip in clips], ticks, atol=1e-6)


@pytest.mark.parametrize(
    ("native", "fps", "expected"),
    [
        (30, 15, [0, 2, 4, 6, 8, 10]),
        (30, 10, [0, 3, 6, 9]),
        (30, 30, list(range(12))),
        (25, 10, [0, 2, 5, 7, 10]),
        (10, 20, [i // 2 for i in range(24)]),
        (24, 30, [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11]),
    ],
)
def test_times_rounded_to_milliseconds_do_not_shake_the_choice(native, fps, expected):
    exact = [index / native for index in range(12)]
    rule = ClipRule(num_frames=1, frame_stride=1, step=1, fps=fps)
    for times in (exact, [round(time, 3) for time in exact], [round(time + 7.4567, 3) for time in exact]):
        assert [n for (n,) in numbers(rule, grey(range(12), times), native)] == expected


def test_clips_of_a_resampled_video_count_its_frames():
    rule = ClipRule(num_frames=3, frame_stride=1, step=2, fps=5)
    frames = grey(range(20))
    clips = list(ClipCutter(rule, 10).cut(frames))
    assert [clip.frame_numbers for clip in clips] == [(0, 2, 4), (4, 6, 8), (8, 10, 12), (12, 14, 16)]
    assert clips[1].start_seconds == pytest.approx(0.4)
    assert clips[1].end_seconds == pytest.approx(1.0)


def test_a_gap_of_more_than_ten_seconds_is_a_break_where_times_count():
    times = [0, 0.1, 0.2, 80_000, 80_000.1, 80_000.2]
    rule = ClipRule(num_frames=2, frame_stride=1, step=1, fps=10)
    assert numbers(rule, grey(range(6), times)) == [(0, 1), (1, 2), (3, 4), (4, 5)]


@pytest.mark.parametrize("fps", [None, 5])
def test_no_clip_spans_a_cut(fps):
    levels = [10] * 7 + [200] * 6 + [90] * 3 + [20] * 8
    rule = ClipRule(num_frames=2, frame_stride=1, step=2, fps=fps, scene_cut=30)
    found = numbers(rule, grey(levels))
    if fps is None:
        assert found == [
            (0, 1),
            (2, 3),
            (4, 5),
            (7, 8),
            (9, 10),
            (11, 12),
            (13, 14),
            (16, 17),
            (18, 19),
            (20, 21),
            (22, 23),
        ]
    else:
        assert found == [(0, 2), (4, 6), (7, 9), (13, 15), (16, 18), (20, 22)]
    assert all(len({levels[n] for n in clip}) == 1 for clip in found)


def test_motion_below_the_threshold_is_no_cut():
    rule = ClipRule(num_frames=4, frame_stride=1, step=4, scene_cut=30)
    assert numbers(rule, grey(range(0, 240, 30))) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_static_and_black_clips_are_counted_and_left_out():
    moving, still, dark = [50, 60, 70, 80], [90] * 4, [3, 8, 3, 8]
    rule = ClipRule(num_frames=4, frame_stride=1, step=4, max_clips=2, reject_static=1, reject_black=10)
    cutter = ClipCutter(rule, 10)
    clips = list(cutter.cut(grey([*still, *moving, *dark, *moving, *still])))
    assert [(clip.ordinal, clip.frame_numbers[0]) for clip in clips] == [(0, 4), (1, 12)]
    assert (cutter.num_static, cutter.num_black, cutter.num_kept) == (1, 1, 2)  # the last was not read


def test_a_video_whose_clips_were_all_rejected_is_not_short():
    cutter = ClipCutter(ClipRule(2, 1, 2, reject_black=10), 10)
    assert list(cutter.cut(grey([0] * 9))) == []
    assert not cutter.is_short


def test_a_frame_rate_and_a_stride_exclude_each_other():
    with pytest.raises(ValidationError, match="fps and frame_stride exclude each other"):
        ClipConfig(fps=5, frame_stride=2)
