from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from clipmill.config import ClipConfig
from clipmill.video import BadVideo, Decoder, DecoderLost, Limits, decode_mp4, probe
from clipmill.video.decode import read_frames
from tests.video.conftest import make_sound, make_video, needs_decord, read_barcode

LIMITS = Limits(cpu_seconds=60, memory_bytes=2 * 2**30, no_progress_seconds=30)
CLIP = ClipConfig(num_frames=8, frame_stride=2, clip_stride=5, resolution=32, fit="stretch")


@pytest.fixture(scope="module")
def decoder():
    with Decoder(LIMITS) as shared:
        yield shared


@pytest.fixture
def hanging(tmp_path):
    """A FIFO that nobody writes: opening it never returns."""
    path = tmp_path / "hanging.mp4"
    os.mkfifo(path)
    return path


def _all_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "clipmill.video" in " ".join(child.cmdline())]


_OLDER: set[psutil.Process] = set()


@pytest.fixture(autouse=True, scope="module")
def _remember_the_children_of_other_tests():
    _OLDER.update(_all_children())


def _children() -> list[psutil.Process]:
    return [child for child in _all_children() if child not in _OLDER]


def _wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_clips_are_the_frames_of_the_rule(tmp_path, decoder):
    path = make_video(tmp_path / "good.mp4")
    frames = np.stack([frame for _, frame in read_frames(path, probe(path), 32, "stretch")])
    clips = list(decoder.clips(path, CLIP, encode=("npy", 0)))
    assert [clip.frame_numbers[0] for clip in clips] == [0, 5, 10, 15, 20, 25]
    for ordinal, clip in enumerate(clips):
        expected = frames[list(range(5 * ordinal, 5 * ordinal + 15, 2))]
        np.testing.assert_array_equal(clip.data, expected)
        assert clip.ordinal == ordinal
        assert clip.fps == 5
        assert clip.start_seconds == pytest.approx(clip.frame_numbers[0] / 10)
        assert clip.end_seconds == pytest.approx((clip.frame_numbers[0] + 15) / 10)
        assert clip.num_values == expected.size
        assert clip.pixel_sum == int(expected.sum(dtype=np.int64))
        assert clip.pixel_square_sum == int((expected.astype(np.int64) ** 2).sum())
    outcome = decoder.outcome
    assert (outcome.num_frames, outcome.num_clips) == (40, 6)
    assert (outcome.short, outcome.truncated, outcome.attempts) == (False, False, [])
    assert outcome.info.decoder == "pyav"


def test_mp4_clips_are_reproducible_and_one_child_serves_many_videos(tmp_path, decoder):
    path = make_video(tmp_path / "good.mp4")
    first = list(decoder.clips(path, CLIP))
    (child,) = _children()
    second = list(decoder.clips(path, CLIP))
    assert first == second
    assert _children() == [child]
    exact = list(decoder.clips(path, CLIP, encode=("npy", 0)))
    for clip, pixels in zip(first, exact, strict=True):
        error = decode_mp4(clip.data).astype(float) - pixels.data
        assert np.mean(error**2) < 30


def test_a_child_keeps_to_one_thread(tmp_path, decoder):
    list(decoder.clips(make_video(tmp_path / "good.mp4"), ClipConfig(num_frames=8, resolution=128)))
    (child,) = _children()
    assert child.num_threads() == 1


def test_max_clips_stops_reading(tmp_path, decoder):
    path = make_video(tmp_path / "good.mp4")
    clips = list(decoder.clips(path, CLIP.model_copy(update={"max_clips_per_video": 2})))
    assert [clip.ordinal for clip in clips] == [0, 1]
    assert decoder.outcome.num_frames == 20
    assert not decoder.outcome.truncated


def test_a_short_video_yields_nothing(tmp_path, decoder):
    path = make_video(tmp_path / "short.mp4", num_frames=14)
    assert list(decoder.clips(path, CLIP)) == []
    assert decoder.outcome.short
    assert not decoder.outcome.truncated


def test_a_truncated_video_is_flagged(tmp_path, decoder):
    path = make_video(tmp_path / "cut.mkv", num_frames=200, options={"bf": "0"})
    path.write_bytes(path.read_bytes()[:-3000])
    assert list(decoder.clips(path, CLIP))
    assert decoder.outcome.truncated


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("no video\n" * 99), "cannot open"),
        (make_sound, "no video stream"),
    ],
)
def test_a_bad_file_is_bad_twice(tmp_path, decoder, make, cause):
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(BadVideo, match=cause) as caught:
        list(decoder.clips(path, CLIP))
    assert len(caught.value.attempts) == 2
    assert decoder.outcome is None
    assert list(decoder.clips(make_video(tmp_path / "good.mp4"), CLIP))


@needs_decord
def test_pyav_has_the_last_word(tmp_path, decoder):
    path = make_video(tmp_path / "broken.mkv", "mjpeg", pix_fmt="yuvj420p", num_frames=60)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]

    def ruin(packets):
        data = bytearray(path.read_bytes())
        for position, size in packets:
            data[position + 6 : position + size - 2] = bytes(size - 8)
        path.write_bytes(data)

    ruin(places[30:31])
    clips = list(decoder.clips(path, CLIP, "decord"))
    assert decoder.outcome.info.decoder == "pyav"
    assert (decoder.outcome.num_frames, decoder.outcome.damaged_frames) == (59, 1)
    assert not any(clip.frame_numbers[0] <= 30 <= clip.frame_numbers[-1] for clip in clips)
    attempts = decoder.outcome.attempts
    assert [attempt.split(":")[0] for attempt in attempts] == ["decord", "decord"]
    assert attempts[0] == attempts[1]  # no time of day in it
    ruin(places)
    with pytest.raises(BadVideo, match="cannot decode the first frame: Invalid data"):
        list(decoder.clips(path, CLIP))


def test_a_span_gives_the_clips_of_its_frames(tmp_path, decoder):
    path = make_video(tmp_path / "long.mp4", num_frames=100, options={"g": "10"})
    whole = [clip.data for clip in decoder.clips(path, CLIP, encode=("npy", None))]
    clips = list(decoder.clips(path, CLIP, encode=("npy", None), span=(3.5, 7.0)))
    assert decoder.outcome.num_frames == 35
    assert [clip.frame_numbers[0] for clip in clips] == [0, 5, 10, 15, 20]
    assert [clip.start_seconds for clip in clips] == [3.5, 4.0, 4.5, 5.0, 5.5]
    assert clips[0].frame_seconds == pytest.approx([3.5 + 0.2 * index for index in range(8)])
    np.testing.assert_array_equal([clip.data for clip in clips], whole[7:12])
    with pytest.raises(BadVideo, match=r"no frame is shown in the span 20\.\.30 s"):
        list(decoder.clips(path, CLIP, span=(20.0, 30.0)))


@pytest.mark.parametrize("start", [0.3, 2.9, 5.8, 5.9])
def test_a_span_of_an_avi_with_b_frames_begins_at_its_frame(tmp_path, start):
    path = make_video(tmp_path / "b.avi", "mpeg4", num_frames=60, tag="XVID", options={"bf": "2", "g": "3"})
    info = probe(path)
    frames = [(time, read_barcode(frame)) for time, frame in read_frames(path, info, 64, "stretch", span=(start, None))]
    assert frames == [(pytest.approx(number / 10), number) for number in range(round(start * 10), 60)]


def test_filters_skip_videos_by_duration_size_and_rate(tmp_path, decoder):
    path = make_video(tmp_path / "four_seconds.mp4")
    for bounds, broken in [
        (
            {"min_seconds": 4.0, "max_seconds": 4.0, "min_height": 64, "min_width": 96, "min_fps": 10, "max_fps": 10},
            None,
        ),
        ({"min_seconds": 4.1}, "min_seconds"),
        ({"max_seconds": 3.9}, "max_seconds"),
        ({"min_height": 65}, "min_height"),
        ({"min_width": 97}, "min_width"),
        ({"min_fps": 11}, "min_fps"),
        ({"max_fps": 9}, "max_fps"),
    ]:
        clips = list(decoder.clips(path, CLIP.model_copy(update=bounds)))
        assert decoder.outcome.filtered == broken
        assert bool(clips) == (broken is None)
        assert not decoder.outcome.short


def test_a_missing_file_is_the_environments_fault(tmp_path, decoder):
    with pytest.raises(DecoderLost, match="No such file"):
        list(decoder.clips(tmp_path / "absent.mp4", CLIP))


def test_a_hanging_decoder_is_killed_in_time(tmp_path, hanging):
    with Decoder(Limits(60, 2**30, no_progress_seconds=1)) as decoder:
        started = time.monotonic()
        with pytest.raises(BadVideo, match="no progress for 1 s") as caught:
            list(decoder.clips(hanging, CLIP))
        assert time.monotonic() - started < 30
        assert caught.value.attempts == ["probe: no progress for 1 s"] * 2
        assert list(decoder.clips(make_video(tmp_path / "good.mp4"), CLIP))


def test_the_cpu_limit_ends_a_video(tmp_path):
    path = make_video(tmp_path / "long.avi", "mpeg4", num_frames=250)
    costly = ClipConfig(num_frames=64, clip_stride=1, resolution=128)
    with (
        Decoder(Limits(cpu_seconds=1, memory_bytes=2 * 2**30, no_progress_seconds=60)) as decoder,
        pytest.raises(BadVideo, match="CPU time limit") as caught,
    ):
        list(decoder.clips(path, costly))
    assert len(caught.value.attempts) == 2


def test_the_memory_limit_ends_a_video(tmp_path):
    path = make_video(tmp_path / "wide.mkv", "ffv1", size=(2048, 1536), num_frames=4, pix_fmt="yuv444p")
    with (
        Decoder(Limits(cpu_seconds=60, memory_bytes=4 * 2**20, no_progress_seconds=60)) as decoder,
        pytest.raises(BadVideo, match=r"memory|allocate|crashed"),
    ):
        list(decoder.clips(path, CLIP))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_killed_from_outside_is_the_environments_fault(tmp_path, hanging, kill):
    with Decoder(LIMITS) as decoder:
        before = set(_children())

        def assassin():
            _wait_until(lambda: set(_children()) - before)
            time.sleep(1.5)  # past the start, into the video
            (set(_children()) - before).pop().send_signal(kill)

        thread = threading.Thread(target=assassin)
        thread.start()
        with pytest.raises(DecoderLost):
            list(decoder.clips(hanging, CLIP))
        thread.join()
        assert list(decoder.clips(make_video(tmp_path / "good.mp4"), CLIP))
    assert set(_children()) <= before


def test_no_child_outlives_its_decoder(tmp_path):
    before = set(_children())
    with Decoder(LIMITS) as decoder:
        list(decoder.clips(make_video(tmp_path / "good.mp4"), CLIP))
        (child,) = set(_children()) - before
    assert not psutil.pid_exists(child.pid)  # ended and reaped: no zombie


def test_the_child_dies_with_its_parent_even_while_it_hangs(hanging):
    program = (
        "import sys; from clipmill.config import ClipConfig; from clipmill.video import Decoder, Limits\n"
        "with Decoder(Limits(60, 2**30, 60)) as decoder: list(decoder.clips(sys.argv[1], ClipConfig()))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(hanging)], cwd=Path(__file__).parents[2])
    try:
        _wait_until(lambda: psutil.Process(parent.pid).children())
        (child,) = psutil.Process(parent.pid).children()
        time.sleep(1.5)
    finally:
        parent.kill()
        parent.wait()
    _wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
