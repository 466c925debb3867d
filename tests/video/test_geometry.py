from __future__ import annotations

import gc
import io
import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from clipmill.video.decode import read_frames
from clipmill.video.decoders.picture import Reading
from clipmill.video.geometry import Orientation, fitted_size
from clipmill.video.probe import probe
from tests.video.conftest import make_video, read_barcode, state_display_width, state_pixel_aspect

SIDES = st.integers(1, 5000)
CLIP_SIDES = st.integers(1, 512)


@given(frame=st.tuples(SIDES, SIDES), clip=st.tuples(CLIP_SIDES, CLIP_SIDES))
def test_fitted_frames_cover_the_clip_or_fit_inside_it(frame, clip):
    cover, inside = fitted_size(frame, clip, "crop"), fitted_size(frame, clip, "pad")
    assert all(a >= b for a, b in zip(cover, clip, strict=True))
    assert any(a == b for a, b in zip(cover, clip, strict=True))
    assert all(a <= b for a, b in zip(inside, clip, strict=True))
    assert any(a == b for a, b in zip(inside, clip, strict=True))
    assert fitted_size(frame, clip, "stretch") == clip


@pytest.mark.parametrize(("rotation", "mirrored"), itertools.product((0, 90, 180, 270), (False, True)))
def test_orientations_mirror_first_and_then_turn(rotation, mirrored):
    pixels = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    orientation = Orientation.of(rotation, mirrored)
    want = np.rot90(pixels[:, ::-1] if mirrored else pixels, rotation // 90)
    np.testing.assert_array_equal(orientation.apply(pixels), want)
    assert (orientation.rotation, orientation.mirrors) == (rotation, mirrored)


def _circle(width: int, height: int, sample_aspect: Fraction) -> np.ndarray:
    """uint8 [height, width, 3]: a white disc, round where pixels have this aspect, its top left quarter grey."""
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = (x - width / 2) * float(sample_aspect), y - height / 2
    picture = np.where(np.hypot(x, y) < min(height, width * float(sample_aspect)) / 3, 255, 0).astype(np.uint8)
    picture[(x < 0) & (y < 0) & (picture > 0)] = 160
    return picture[..., None].repeat(3, axis=2)


def _write(path, codec, picture, *, codec_aspect=None, matrix=None, pix_fmt="yuv420p", num_frames=6):
    """A video of one picture."""
    height, width = picture.shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if codec_aspect is not None:
            stream.codec_context.sample_aspect_ratio = codec_aspect
        if matrix is not None:
            a, b, c, d = (65536 * sign for sign in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _roundness(frame: np.ndarray) -> float:
    """Width over height of what is bright."""
    rows, columns = np.nonzero(frame.mean(axis=2) > 80)
    return (np.ptp(columns) + 1) / (np.ptp(rows) + 1)


WIDE = Fraction(4, 3)
ASPECTS = [
    ("wide.mp4", "libx264", {"codec_aspect": WIDE}),
    ("wide.mov", "libx264", {"codec_aspect": WIDE}),
    ("wide.mkv", "libx264", {"codec_aspect": WIDE}),
    ("only_container.webm", "libvpx", {}),
    ("only_container.mov", "mjpeg", {"codec_aspect": WIDE, "pix_fmt": "yuvj420p"}),
    ("container_wins.mp4", "libx264", {"codec_aspect": Fraction(1)}),
    ("wide.avi", "mpeg4", {"codec_aspect": WIDE}),
    ("wide.mpg", "mpeg2video", {"codec_aspect": Fraction(64, 45)}),
    ("wide.ts", "libx264", {"codec_aspect": WIDE}),
]


@pytest.mark.parametrize(("name", "codec", "aspects"), ASPECTS, ids=[case[0] for case in ASPECTS])
def test_clips_have_square_pixels(tmp_path, name, codec, aspects):
    # MPEG-2 states the shape of the whole picture, of which there are few: 16:9 for 360 x 288
    size = (360, 288) if codec == "mpeg2video" else (240, 180)
    aspect = WIDE if "container" in name else aspects["codec_aspect"]
    path = _write(tmp_path / name, codec, _circle(*size, aspect), **aspects)
    if name == "only_container.webm":
        state_display_width(path, 320)
    elif name == "container_wins.mp4":
        state_pixel_aspect(path, 4, 3)
    info = probe(path)
    assert info.sample_aspect == pytest.approx(float(aspect), rel=0.01)
    for _, frame in read_frames(path, info, 128, "crop", whole=True):
        assert _roundness(frame) == pytest.approx(1, abs=0.02)
        assert frame.shape[1] / frame.shape[0] == pytest.approx(size[0] * float(aspect) / size[1], rel=0.01)


MATRICES = list(itertools.product((1, -1), (1, -1), (False, True)))


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "libx264"), ("mov", "mpeg4"), ("mkv", "libvpx")])
@pytest.mark.parametrize(("sign_x", "sign_y", "swaps"), MATRICES)
def test_each_display_matrix_shows_what_a_player_shows(tmp_path, ending, codec, sign_x, sign_y, swaps):
    picture = _circle(96, 64, Fraction(1))
    # (a, b, c, d): a stored point (x, y) is shown at (a x + c y, b x + d y), up to a shift
    matrix = (0, sign_y, sign_x, 0) if swaps else (sign_x, 0, 0, sign_y)
    path = _write(tmp_path / f"turned.{ending}", codec, picture, matrix=matrix)
    a, b, c, d = matrix
    shown = np.zeros((96, 64) if swaps else (64, 96))
    for y, x in itertools.product(range(64), range(96)):
        to_x, to_y = a * x + c * y, b * x + d * y
        shown[to_y % shown.shape[0], to_x % shown.shape[1]] = picture[y, x, 0]  # -1 is the last one
    # a mirrored axis maps 0 to 0, 1 to -1: one place too far
    shown = np.roll(shown, (-(b < 0 or d < 0), -(a < 0 or c < 0)), (0, 1))
    (_, frame), *_ = read_frames(path, probe(path), shown.shape, "crop")
    assert np.abs(frame.mean(axis=2) - shown).mean() < 4


def _spliced(path, parts):
    """Pictures of different sizes and aspects in one stream of VP8 or MPEG-2, one behind the other."""
    with av.open(str(path), "w") as writing:
        copy, tick = None, 0
        for part in parts:
            with av.open(str(part)) as reading:
                stream = reading.streams.video[0]
                if copy is None:
                    copy = writing.add_stream_from_template(stream)
                for packet in reading.demux(stream):
                    if packet.dts is None:
                        continue
                    packet.pts = packet.dts = round(tick / (25 * packet.time_base))
                    packet.stream, tick = copy, tick + 1
                    writing.mux(packet)
    return path


def test_a_change_of_size_begins_a_scene_of_its_own_shape(tmp_path):
    across = _write(tmp_path / "across.webm", "libvpx", _circle(160, 96, Fraction(1)))
    upright = _write(tmp_path / "upright.webm", "libvpx", _circle(96, 160, Fraction(1)))
    path = _spliced(tmp_path / "turned.webm", [across, upright])
    reading = Reading()
    frames = [frame for _, frame in read_frames(path, probe(path), 64, "crop", whole=True, reading=reading)]
    assert [frame.shape[:2] for frame in frames] == [(64, 107)] * 6 + [(107, 64)] * 6
    assert all(_roundness(frame) == pytest.approx(1, abs=0.03) for frame in frames)
    assert reading.scene_starts == {6}


def test_a_change_of_the_pixel_aspect_counts_from_the_frame_that_states_it(tmp_path):
    square, wide = Fraction(1), Fraction(64, 45)  # as a broadcast does between films
    first = _write(tmp_path / "square.ts", "mpeg2video", _circle(360, 288, square), codec_aspect=square)
    second = _write(tmp_path / "wide.ts", "mpeg2video", _circle(360, 288, wide), codec_aspect=wide)
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    reading = Reading()
    frames = [frame for _, frame in read_frames(path, probe(path), 128, "crop", whole=True, reading=reading)]
    assert [frame.shape[1] for frame in frames] == [160] * 6 + [228] * 6
    assert all(_roundness(frame) == pytest.approx(1, abs=0.02) for frame in frames)
    assert 6 in reading.scene_starts


def test_rectangles(tmp_path):
    path = make_video(tmp_path / "wide.mp4", size=(160, 90))
    for fit in ("crop", "pad", "stretch"):
        frames = [frame for _, frame in read_frames(path, probe(path), (36, 64), fit)]
        assert {frame.shape for frame in frames} == {(36, 64, 3)}
        assert [read_barcode(frame) for frame in frames] == list(range(40))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_cameras_are_turned_as_their_exif_says(tmp_path, orientation):
    picture = Image.fromarray(_circle(96, 64, Fraction(1)))
    picture.paste((255, 0, 0), (0, 0, 32, 16))  # tells all orientations apart
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif, quality=95, subsampling=0)
    path = tmp_path / "camera.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_mux_stream("mjpeg", rate=10, width=96, height=64)
        packet = av.Packet(file.getvalue())
        packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 10), 0, 0
        container.mux(packet)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    ((_, frame),) = read_frames(path, probe(path), shown.shape[:2], "crop")
    assert np.abs(frame.astype(int) - shown).mean() < 2


def test_frames_are_freed_without_the_garbage_collector(tmp_path):
    path = make_video(tmp_path / "many.mp4", num_frames=60)
    info = probe(path)
    gc.collect()
    gc.disable()  # it seldom runs: decoded frames of 4K are 12 MB each
    try:
        for _ in read_frames(path, info, 32, "crop"):
            pass
        alive = sum(isinstance(each, av.VideoFrame) for each in gc.get_objects())
    finally:
        gc.enable()
    assert alive < 20
