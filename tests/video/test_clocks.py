from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipmill.video.decode import read_frames
from clipmill.video.probe import probe
from clipmill.video.rate import rate_of_seconds
from tests.video.conftest import make_video


def _write(path, milliseconds, codec="libx264"):
    """One frame at each time; times are stored in milliseconds."""
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {"bf": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number * 5 % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _forget_frame_duration(path):
    """Turns Matroska's DefaultDuration (ID 23E383) into padding, as recorders of live video leave it out."""
    data = bytearray(path.read_bytes())
    start = data.index(b"\x23\xe3\x83")
    length = 4 + (data[start + 3] & 0x7F)
    data[start : start + length] = bytes([0xEC, 0x80 | (length - 2)]) + bytes(length - 2)
    path.write_bytes(data)
    return path


def _times(path):
    return [time for time, _ in read_frames(path, probe(path), 16, "crop")]


@pytest.mark.parametrize(("file", "codec"), [("live.mkv", "libx264"), ("live.webm", "libvpx")])
@pytest.mark.parametrize("fps", [Fraction(30), Fraction(30000, 1001), Fraction(15), Fraction(12), Fraction(60)])
def test_without_a_stated_rate_the_timestamps_have_one(tmp_path, file, codec, fps):
    path = _forget_frame_duration(_write(tmp_path / file, [round(1000 * k / fps) for k in range(140)], codec))
    assert probe(path).fps == pytest.approx(float(fps), rel=1e-3)


def test_a_rate_that_the_timestamps_belie_is_not_believed(tmp_path):
    path = _write(tmp_path / "slow.mkv", [100 * k for k in range(30)])  # the header says 25
    assert probe(path).fps == 10


@pytest.mark.parametrize(("file", "codec"), [("raw.h264", "libx264"), ("raw.hevc", "libx265")])
def test_a_raw_stream_has_the_rate_of_its_codec(tmp_path, file, codec):
    path = make_video(tmp_path / file, codec, num_frames=12)
    assert probe(path).fps == 10  # FFmpeg's demuxer says 25
    np.testing.assert_allclose(_times(path), np.arange(12) / 10, atol=1e-6)


def test_jitter_has_its_average_rate(tmp_path):
    steps = np.random.default_rng(0).choice([16, 17, 33, 34, 50], 200)
    times = [0, *np.cumsum(steps).tolist()]
    path = _forget_frame_duration(_write(tmp_path / "jitter.webm", times, "libvpx"))
    assert probe(path).fps == pytest.approx(1000 / steps[:111].mean(), rel=0.02)


@pytest.mark.parametrize("start", [0, 95_000_000, 1_750_000_000_000])
def test_clocks_may_start_at_any_value_and_pauses_stay(tmp_path, start):
    times = [100 * k for k in range(12)] + [3200 + 100 * k for k in range(12)]
    path = _write(tmp_path / "clock.mkv", [start + time for time in times])
    assert probe(path).fps == 10
    np.testing.assert_allclose(_times(path), np.array(times) / 1000, atol=1e-3)


@given(
    fps=st.sampled_from([Fraction(n, d) for n in (24, 25, 30, 48, 50, 60, 120, 12, 15) for d in (1,)]),
    n=st.integers(2, 128),
)
def test_rates_of_rounded_times(fps, n):
    measured = rate_of_seconds([round(float(k / fps), 3) for k in range(n)])
    assert measured == pytest.approx(float(fps), rel=2e-3 * float(fps) / n + 1e-6)


def test_a_single_frame_has_some_rate(tmp_path):
    for name, codec in (("one.webm", "libvpx"), ("one.mp4", "libx264")):
        path = make_video(tmp_path / name, codec, num_frames=1)
        assert probe(path).fps > 0
        assert _times(path) == [0.0]


def test_gif_delays_are_those_of_browsers(tmp_path):
    delays = [0, 10, 20, 30, 100, 500, 1000]  # milliseconds; browsers take the first two for 100
    pictures = [Image.fromarray(np.full((32, 32, 3), 30 * k, np.uint8)) for k in range(len(delays))]
    path = tmp_path / "delays.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays)
    np.testing.assert_allclose(_times(path), np.cumsum([0, 100, 100, 20, 30, 100, 500]) / 1000)


@pytest.mark.parametrize(("delay", "fps"), [(0, 10), (10, 10), (20, 50), (40, 25), (80, 12.5)])
def test_a_gif_has_the_rate_at_which_browsers_show_it(tmp_path, delay, fps):
    pictures = [Image.fromarray(np.full((32, 32, 3), 10 * k, np.uint8)) for k in range(20)]
    path = tmp_path / "delays.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delay)
    assert probe(path).fps == pytest.approx(fps, rel=1e-3)
    np.testing.assert_allclose(_times(path), np.arange(20) / fps)


def test_avi_with_lost_frames_keeps_the_places_of_the_others(tmp_path):
    path = make_video(tmp_path / "hit.avi", "mpeg4", num_frames=60, tag="XVID", options={"bf": "2", "g": "12"})
    whole = _times(path)
    np.testing.assert_allclose(whole, np.arange(60) / 10, atol=1e-6)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    hit = packets[13]
    data[hit.pos : hit.pos + hit.size] = b"\xff" * hit.size
    path.write_bytes(data)
    times = _times(path)
    assert 20 < len(times) < 60
    assert set(np.round(times, 6)) <= set(np.round(whole, 6))
    assert times[-1] == pytest.approx(whole[-1])


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4"])
@pytest.mark.parametrize(("step", "fps"), [(1, 50.0), (2, 25.0), (3, 50 / 3)])
def test_avi_with_empty_chunks_has_the_rate_of_the_others(tmp_path, codec, step, fps):
    path = tmp_path / "copied.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=50)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 50)
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number * 5, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number * step, Fraction(1, 50)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(path).fps == pytest.approx(fps)
    np.testing.assert_allclose(_times(path), np.arange(20) / fps)


def test_animated_pictures_are_read_as_videos(tmp_path):
    pictures = [Image.fromarray(np.full((32, 48, 3), 30 * k, np.uint8)) for k in range(8)]
    for ending in ("webp", "png"):
        path = tmp_path / f"animated.{ending}"
        pictures[0].save(
            path,
            save_all=True,
            append_images=pictures[1:],
            duration=40,
            **({"lossless": True} if ending == "webp" else {}),
        )
        info = probe(path, "decord")
        assert (info.decoder, info.fps, info.container_frames) == ("pillow", 25.0, 8)
        frames = list(read_frames(path, info, (36, 64), "crop"))
        np.testing.assert_allclose([time for time, _ in frames], np.arange(8) / 25)
        assert [int(frame.mean()) for _, frame in frames] == [30 * k for k in range(8)]
