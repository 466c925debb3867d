from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clipmill.video.decoders.by_pillow import read_animation
from clipmill.video.errors import VideoError

NUM_FRAMES = 4


def pictures(mode: str = "RGB") -> list[Image.Image]:
    """A square that moves over a ground of one colour; with alpha, the ground is transparent and the square half so."""
    frames = []
    for index in range(NUM_FRAMES):
        frame = Image.new(mode, (40, 30), {"RGB": (10, 20, 200), "RGBA": (0, 0, 0, 0)}[mode])
        frame.paste({"RGB": (250, 128, 0), "RGBA": (250, 128, 0, 128)}[mode], (8 * index, 10, 8 * index + 8, 18))
        frames.append(frame)
    return frames


def save(path: Path, frames: list[Image.Image], **keys: Any) -> Path:
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **lossless, **keys)
    return path


@pytest.fixture(params=[".webp", ".png"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def test_frames_are_those_that_were_written(tmp_path: Path, suffix: str) -> None:
    written = pictures()
    frames, info = read_animation(save(tmp_path / f"a{suffix}", written, duration=40))
    assert (info.format, info.width, info.height) == (suffix[1:], 40, 30)
    assert (info.num_frames, info.has_alpha) == (NUM_FRAMES, False)
    times, pixels = zip(*frames, strict=True)
    assert times == pytest.approx([0.0, 0.04, 0.08, 0.12])
    np.testing.assert_array_equal(pixels, [np.asarray(frame) for frame in written])
    assert pixels[0].dtype == np.uint8


def test_each_frame_has_its_own_delay_and_a_tiny_one_is_a_tenth_of_a_second(tmp_path: Path, suffix: str) -> None:
    frames, _ = read_animation(save(tmp_path / f"a{suffix}", pictures(), duration=[10, 11, 0, 300]))
    assert [time for time, _ in frames] == pytest.approx([0.0, 0.1, 0.111, 0.211])


def test_transparent_pixels_are_shown_over_white(tmp_path: Path, suffix: str) -> None:
    frames, info = read_animation(save(tmp_path / f"a{suffix}", pictures("RGBA"), duration=40, disposal=1))
    assert info.has_alpha
    for index, (_, pixels) in enumerate(frames):
        assert pixels[0, 0].tolist() == [255, 255, 255]
        np.testing.assert_allclose(pixels[14, 8 * index + 4], np.array([250, 128, 0]) * 0.5 + 127.5, atol=2)
    # A GIF's transparent pixels are white too, as FFmpeg gives them.
    path = save(tmp_path / "a.gif", pictures("RGBA"), duration=40, disposal=2)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).to_ndarray(format="rgb24")[0, 0].tolist() == [255, 255, 255]


def test_frames_that_change_a_part_of_the_canvas_are_composed(tmp_path: Path) -> None:
    """As optimising writers store them: FFmpeg reads the same animation from PNG."""
    path = save(tmp_path / "a.png", pictures(), duration=40)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames, _ = read_animation(path)
    np.testing.assert_array_equal([pixels for _, pixels in frames], expected)


def test_a_picture_for_other_viewers_is_no_frame(tmp_path: Path) -> None:
    frames = pictures()
    path = save(tmp_path / "a.png", [Image.new("RGB", (40, 30), "red"), *frames], duration=40, default_image=True)
    read, info = read_animation(path)
    times, pixels = zip(*read, strict=True)
    assert info.num_frames == NUM_FRAMES
    assert times[:2] == pytest.approx((0.0, 0.04))
    np.testing.assert_array_equal(pixels, [np.asarray(frame) for frame in frames])


def test_palettes_and_grey_are_colours(tmp_path: Path, suffix: str) -> None:
    for mode in ("L", "P"):
        written = [frame.convert(mode) for frame in pictures()]
        frames, _ = read_animation(save(tmp_path / f"{mode}{suffix}", written, duration=40))
        expected = [np.asarray(frame.convert("RGB")) for frame in written]
        np.testing.assert_array_equal([pixels for _, pixels in frames], expected)


def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    written = np.zeros((3, 8, 8), np.uint16)
    for index in range(3):
        written[index, index] = 20_000 + 10_000 * index
    frames, _ = read_animation(save(tmp_path / "a.png", [Image.fromarray(frame) for frame in written], duration=40))
    np.testing.assert_array_equal([pixels[..., 1] for _, pixels in frames], written >> 8)


def test_what_is_no_animation_is_the_videos_fault(tmp_path: Path, suffix: str) -> None:
    still = tmp_path / f"still{suffix}"
    pictures()[0].save(still)
    with pytest.raises(VideoError, match="a still picture"):
        read_animation(still)
    (tmp_path / f"text{suffix}").write_text("no picture")
    with pytest.raises(VideoError, match="cannot open: cannot identify image file"):
        read_animation(tmp_path / f"text{suffix}")
    with pytest.raises(FileNotFoundError):
        read_animation(tmp_path / "missing.webp")


def test_a_file_that_is_cut_is_an_error_not_a_shorter_video(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 40, 40, 3), np.uint8)
    path = save(tmp_path / f"a{suffix}", [Image.fromarray(frame) for frame in noise], duration=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(VideoError):
        list(read_animation(path)[0])
