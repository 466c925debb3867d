from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from clipmill.video.decode import is_truncated, read_frames
from clipmill.video.decoders.picture import Reading
from clipmill.video.errors import VideoError
from clipmill.video.probe import VideoInfo, probe
from tests.video.conftest import barcode, make_edited, make_sound, make_video, needs_decord, read_barcode

SHARED_VIDEOS = Path(__file__).parents[3] / "shared" / "videos"

# name, encoder, options of make_video, "decord" where that is right too
CONTAINERS = [
    ("plain.mp4", "libx264", {}, "decord"),
    ("b_frames_open_gop.mp4", "libx264", {"options": {"bf": "3", "x264-params": "open-gop=1:keyint=12"}}, "decord"),
    ("plain.mkv", "libx264", {}, "decord"),
    ("odd.mkv", "mjpeg", {"size": (97, 63), "pix_fmt": "yuvj420p"}, "decord"),
    ("vp8.webm", "libvpx", {}, "decord"),
    ("vp9.webm", "libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8"}}, "decord"),
    ("mpeg4.mp4", "mpeg4", {}, "decord"),
    ("mpeg4.avi", "mpeg4", {"options": {"bf": "2"}}, "pyav"),
    ("h264.avi", "libx264", {"options": {"bf": "0"}}, "pyav"),
    ("h264.ts", "libx264", {}, "pyav"),
    ("mpeg1.mpg", "mpeg1video", {"fps": 25}, "pyav"),
    ("odd.gif", "gif", {"pix_fmt": "rgb8", "size": (97, 63)}, "pyav"),
    ("ffv1.mkv", "ffv1", {"pix_fmt": "yuv444p"}, "pyav"),
    ("av1.mp4", "libsvtav1", {"options": {"preset": "8", "crf": "10"}}, "pyav"),
    ("hevc.mp4", "libx265", {"options": {"preset": "ultrafast", "x265-params": "log-level=none"}}, "pyav"),
    ("large.mp4", "libx264", {"size": (720, 480), "num_frames": 12}, "pyav"),
    ("two_streams.mp4", "libx264", {"num_streams": 2}, "pyav"),
]


@pytest.mark.parametrize(("name", "codec", "options", "decoder"), CONTAINERS, ids=[c[0] for c in CONTAINERS])
def test_every_frame_comes_once_and_in_order(tmp_path, name, codec, options, decoder):
    path = make_video(tmp_path / name, codec, **options)
    info = probe(path)
    frames = list(read_frames(path, info, 64, "stretch"))
    assert [read_barcode(frame) for _, frame in frames] == list(range(options.get("num_frames", 40)))
    assert info.decoder == "pyav"
    assert not is_truncated(info, len(frames), frames[0][0], frames[-1][0])
    times = np.array([time for time, _ in frames])
    # gif counts hundredths of a second, Matroska thousandths
    np.testing.assert_allclose(np.diff(times), 1 / options.get("fps", 10), atol=0.011)


@needs_decord
@pytest.mark.parametrize("case", [c for c in CONTAINERS if c[3] == "decord"], ids=lambda case: case[0])
def test_where_decord_was_asked_for_pixels_and_times_do_not_depend_on_who_reads(tmp_path, case):
    name, codec, options, _ = case
    path = make_video(tmp_path / name, codec, **options)
    info = probe(path)
    by_decord, by_pyav = (
        list(read_frames(path, dataclasses.replace(info, decoder=decoder), 48, "crop", rgb_first=True))
        for decoder in ("decord", "pyav")
    )
    assert [time for time, _ in by_decord] == [time for time, _ in by_pyav]
    np.testing.assert_array_equal([frame for _, frame in by_decord], [frame for _, frame in by_pyav])


@pytest.mark.parametrize("rotation", [90, -90, 180])
@pytest.mark.parametrize("decoder", [pytest.param("decord", marks=needs_decord), "pyav"])
def test_rotation_is_undone_once_by_either_decoder(tmp_path, rotation, decoder):
    path = make_video(tmp_path / "turned.mp4", size=(96, 64), rotation=rotation)
    info = probe(path, decoder)
    assert info.rotation == rotation % 360
    for number, (_, frame) in enumerate(read_frames(path, info, 64, "stretch")):
        stored = np.rot90(frame, -rotation // 90)
        assert read_barcode(stored) == number


def test_an_edit_list_cuts_its_frames(tmp_path):
    path = make_edited(tmp_path / "edited.mp4", make_video(tmp_path / "whole.mp4"), shift_seconds=1.0)
    info = probe(path)
    assert info.decoder == "pyav"
    frames = list(read_frames(path, info, 64, "stretch"))
    assert [read_barcode(frame) for _, frame in frames] == list(range(10, 40))
    assert not is_truncated(info, len(frames), frames[0][0], frames[-1][0])


def test_variable_frame_rate_keeps_all_frames_and_their_times(tmp_path):
    pts = [0, 1, 2, 10, 11, 30, 31, 32, 33, 60]
    path = make_video(tmp_path / "vfr.mp4", num_frames=len(pts), pts=pts)
    frames = list(read_frames(path, probe(path), 64, "stretch"))
    assert [read_barcode(frame) for _, frame in frames] == list(range(len(pts)))
    np.testing.assert_allclose([time for time, _ in frames], np.array(pts) / 10, atol=1e-6)


def _combing(frames: list[np.ndarray]) -> float:
    """How much more neighbouring rows differ than rows of one field."""
    stack = np.stack(frames).astype(float)
    return np.abs(stack[:, 1:] - stack[:, :-1]).mean() - np.abs(stack[:, 2:] - stack[:, :-2]).mean()


def test_interlaced_pictures_are_made_whole(tmp_path):
    path = tmp_path / "fields.mp4"
    with av.open(str(path), "w") as container:
        options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "crf": "5"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(12):
            picture = np.zeros((64, 96, 3), np.uint8)
            for field in range(2):  # a bar that moves 4 pixels a field
                left = 4 * (2 * index + field) % 80
                picture[field::2, left : left + 16] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(path)
    assert (info.interlaced, info.decoder) == (True, "pyav")
    whole, woven = (
        [frame for _, frame in read_frames(path, dataclasses.replace(info, interlaced=interlaced), 64, "crop")]
        for interlaced in (True, False)
    )
    assert len(whole) == len(woven) == 12
    assert _combing(woven) > 10
    assert _combing(whole) < 2


def test_avi_with_b_frames_has_even_times(tmp_path):
    path = make_video(tmp_path / "b.avi", "libx264", options={"bf": "2"})
    times = [time for time, _ in read_frames(path, probe(path), 64, "stretch")]
    np.testing.assert_allclose(np.diff(times), 0.1)


@pytest.mark.parametrize(("name", "codec"), [("cut.mkv", "libx264"), ("cut.avi", "mpeg4"), ("cut.webm", "libvpx")])
def test_a_truncated_file_is_short_and_says_so(tmp_path, name, codec):
    path = make_video(tmp_path / name, codec, num_frames=200, options={"g": "10", "bf": "0"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    info = probe(path)
    frames = list(read_frames(path, info, 64, "stretch"))
    assert [read_barcode(frame) for _, frame in frames] == list(range(len(frames)))
    assert 0 < len(frames) < 150
    assert is_truncated(info, len(frames), frames[0][0], frames[-1][0])


def test_frames_before_the_damage_count_though_the_decoder_held_them_back(tmp_path):
    faststart = {"movflags": "faststart"}
    path = make_video(tmp_path / "cut.mp4", options={"bf": "3"}, container_options=faststart)
    with av.open(str(path)) as container:
        second = [packet for packet in container.demux(video=0) if packet.size][1]
        end = second.pos + second.size
    path.write_bytes(path.read_bytes()[: end - 1])
    frames = list(read_frames(path, probe(path), 64, "stretch"))
    assert [read_barcode(frame) for _, frame in frames] == [0]


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("this is not a video, whatever its name says\n" * 100)


def _cut_mp4(path: Path) -> None:
    make_video(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (_nothing, "the file is empty"),
        (_text, "cannot open: Invalid data"),
        (_cut_mp4, "cannot open: Invalid data"),
        (make_sound, r"no video stream \(found: audio\)"),
    ],
)
def test_an_unreadable_file_says_why(tmp_path, make, cause):
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(VideoError, match=cause):
        probe(path)


def test_a_missing_file_is_not_the_videos_fault(tmp_path):
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "absent.mp4")


_HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hls.mp4", _HLS.format("http://127.0.0.1:9/secret.ts")),
        ("beside.ts", _HLS.format("secret.ts")),
        ("concat.mkv", "ffconcat version 1.0\nfile secret.ts\n"),
        ("session.mp4", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        ("text.nfo.mp4", "\x1b[2J\x1b[1;32mhello\n" * 100),
        ("frame%03d.png", ""),
    ],
)
def test_a_file_that_is_no_video_opens_no_other_file(tmp_path, name, text):
    make_video(tmp_path / "secret.ts")
    (tmp_path / name).write_text(text)
    with pytest.raises(VideoError):
        probe(tmp_path / name)


def test_a_picture_is_no_video(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "x.mp4", "bmp")
    with pytest.raises(VideoError, match="not in a video format"):
        probe(tmp_path / "x.mp4")


@pytest.mark.parametrize(
    ("size", "fit"), [((97, 63), "crop"), ((63, 97), "crop"), ((97, 63), "pad"), ((63, 97), "pad")]
)
def test_fits_keep_the_centre(tmp_path, size, fit):
    # Number 255, the last one: all bars white.
    path = make_video(tmp_path / "white.mkv", "ffv1", size=size, num_frames=256, pix_fmt="yuv444p")
    *_, (_, white) = read_frames(path, probe(path), 32, fit)
    assert white.shape == (32, 32, 3)
    if fit == "crop":
        assert white.min() > 250
        return
    filled = np.argwhere(white.mean(axis=2) > 250)
    assert len(filled) == 32 * round(32 * 63 / 97)
    np.testing.assert_allclose(filled.mean(axis=0), 15.5, atol=0.5)


def test_the_resizer_leaves_frames_of_the_right_size_alone(tmp_path):
    path = make_video(tmp_path / "same.mkv", "ffv1", size=(64, 64), num_frames=2, pix_fmt="bgr0")
    for number, (_, frame) in enumerate(read_frames(path, probe(path), 64, "crop")):
        np.testing.assert_array_equal(frame, barcode(number, 64, 64))


REAL_VIDEOS = {  # frames that ffmpeg counts
    "decord__flipping_a_pancake.mkv": 310,
    "decord__video_90.mov": 3,
    "energon__sync_test.avi": 1891,
    "imageio__realshort.mp4": 36,
    "mmaction__test.avi": 164,
    "torchcodec__av1_video.mkv": 125,
    "torchcodec__h265_video.mp4": 10,
    "torchcodec__nasa_13013.mp4": 390,
    "vidtok__example.mp4": 136,
}


needs_footage = pytest.mark.skipif(not SHARED_VIDEOS.is_dir(), reason=f"no real footage at {SHARED_VIDEOS}")


@needs_footage
@pytest.mark.parametrize(("name", "num_frames"), REAL_VIDEOS.items())
def test_real_footage(name, num_frames):
    path = SHARED_VIDEOS / name
    info, reading = probe(path), Reading()
    frames = list(read_frames(path, info, 64, "crop", reading=reading))
    assert len(frames) == num_frames
    assert not is_truncated(info, num_frames, frames[0][0], frames[-1][0])
    assert all(late > early for (early, _), (late, _) in itertools.pairwise(frames))
    assert (reading.damaged_frames, reading.joins, reading.scene_starts) == (0, 0, set())


@needs_footage
def test_damaged_footage_gives_the_frames_before_the_damage():
    path = SHARED_VIDEOS / "decord__corrupted.mp4"
    info, reading = probe(path), Reading()
    frames = list(read_frames(path, info, 64, "crop", reading=reading))
    assert len(frames) + reading.damaged_frames == info.container_frames == 50
    assert reading.damaged_frames > 0
    assert is_truncated(info, len(frames), frames[0][0], frames[-1][0])


@needs_footage
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg on this machine")
@pytest.mark.parametrize("name", REAL_VIDEOS)
def test_real_footage_is_within_a_grey_level_of_ffmpegs(name):
    path = SHARED_VIDEOS / name
    info = probe(path)
    frames = np.stack([frame for _, frame in read_frames(path, info, 64, "crop", whole=True)])
    height, width = frames.shape[1:3]
    scale = f"scale={width}:{height}:flags=area+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", f"0:{info.stream_index}", "-fps_mode", "passthrough"]
    command += ["-vf", scale, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    theirs = np.frombuffer(output, np.uint8).reshape(-1, height, width, 3)
    assert len(theirs) == len(frames)
    assert np.abs(frames.astype(int) - theirs).mean(axis=(1, 2, 3)).max() < 1


def test_truncation_takes_the_smaller_claim():
    info = VideoInfo("avi", "h264", "yuv420p", 64, 64, 0, 10.0, 30.0, 100, 0, "pyav")
    assert not is_truncated(info, 100, 0.0, 9.9)
    assert not is_truncated(info, 97, 0.0, 9.6)
    assert not is_truncated(info, 100, 20.0, 29.9)
    assert is_truncated(info, 90, 0.0, 8.9)
    assert is_truncated(info, 50, 20.0, 24.9)  # the time before the first frame covers nothing
    sparse = dataclasses.replace(info, container_frames=None)  # 100 frames in 30 s, at an average of 10 by its header
    assert not is_truncated(sparse, 100, 0.0, 29.7)
    assert is_truncated(sparse, 100, 0.0, 9.9)
    unknown = dataclasses.replace(sparse, duration_seconds=None)
    assert not is_truncated(unknown, 1, 0.0, 0.0)
