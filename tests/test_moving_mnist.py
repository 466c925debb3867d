from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from clipmill.cli.command import app
from clipmill.errors import UserError
from clipmill.moving_mnist import NUM_FRAMES, SIZE, draw_video, generate, read_digits


def draw_digits(count: int = 10) -> np.ndarray:
    """uint8 [count, 28, 28]: rings, bars and boxes, a different brightness each."""
    y, x = np.mgrid[:28, :28] - 13.5
    shapes = (np.abs(np.hypot(x, y) - 8) < 2, np.abs(x) < 2, np.abs(y) < 2, np.maximum(np.abs(x), np.abs(y)) < 6)
    return np.stack([np.where(shapes[i % 4], 255 - 10 * i, 0) for i in range(count)]).astype(np.uint8)


def idx_bytes(digits: np.ndarray) -> bytes:
    return b"\0\0\x08\x03" + np.array(digits.shape, ">u4").tobytes() + digits.tobytes()


def test_a_file_has_the_published_layout_and_its_videos_follow_from_seed_and_index(tmp_path: Path) -> None:
    digits = draw_digits()
    generate(digits, str(tmp_path / "a.npy"), num_videos=300, seed=3)
    generate(digits, str(tmp_path / "b.npy"), num_videos=5, seed=3)
    generate(digits, str(tmp_path / "c.npy"), num_videos=5, seed=4)
    many, few, others = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert (many.dtype, many.shape) == (np.uint8, (NUM_FRAMES, 300, SIZE, SIZE))
    np.testing.assert_array_equal(many[:, :5], few)
    np.testing.assert_array_equal(many[:, 299], draw_video(digits, 3, 299))
    assert not (few == others).all(axis=(0, 2, 3)).any()


def test_two_digits_move_in_straight_lines_and_bounce_off_the_walls() -> None:
    dot = np.zeros((1, 28, 28), np.uint8)
    dot[0, 14, 14] = 255
    num_bounces = 0
    for index in range(20):
        frames = draw_video(dot, 0, index)
        counts = (frames > 0).sum(axis=(1, 2))
        assert set(counts.tolist()) <= {1, 2}
        assert (counts == 2).mean() > 0.5
        places = np.argwhere(frames)[:, 1:]
        assert places.min() >= 14
        assert places.max() <= 14 + SIZE - 28
        num_bounces += int((places == 14).any() or (places == 14 + SIZE - 28).any())
        rows = np.array([np.argwhere(frame).mean(axis=0) for frame in frames[:2]])
        assert np.abs(np.diff(rows, axis=0)).max() <= 5
    assert num_bounces > 5


def test_where_digits_overlap_the_brighter_pixel_shows() -> None:
    full = np.stack([np.full((SIZE, SIZE), 90, np.uint8), np.full((SIZE, SIZE), 200, np.uint8)])
    values = {int(draw_video(full, 0, index).max()) for index in range(20)}
    assert values == {90, 200}
    assert all((draw_video(full, 0, i) == draw_video(full, 0, i).max()).all() for i in range(3))  # no room to move


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("train-images-idx3-ubyte", lambda path, digits: path.write_bytes(idx_bytes(digits))),
        ("train-images-idx3-ubyte.gz", lambda path, digits: path.write_bytes(gzip.compress(idx_bytes(digits)))),
        ("digits.npy", lambda path, digits: np.save(path, digits)),
        ("digits.npz", lambda path, digits: np.savez(path, images=digits, labels=np.arange(len(digits)))),
        ("mnist.npz", lambda path, digits: np.savez(path, x_test=digits[:2], x_train=digits)),
    ],
)
def test_digits_are_read_from_each_format(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray], object]
) -> None:
    write(tmp_path / name, draw_digits())
    np.testing.assert_array_equal(read_digits(tmp_path / name), draw_digits())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "holds no digits"),
        (b"some text", "holds no digits"),
        (gzip.compress(b"some text", mtime=0), "holds no digits"),
        (idx_bytes(draw_digits())[:-1], "holds no digits"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + bytes(100), "holds no digits"),
        (idx_bytes(np.zeros((0, 28, 28), np.uint8)), r"digits of shape \[0, 28, 28\]; name a file with digits"),
        (idx_bytes(np.zeros((1, 70, 28), np.uint8)), r"digits of shape \[1, 70, 28\]; name a file with digits"),
    ],
)
def test_another_file_is_one_clear_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "digits").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_digits(tmp_path / "digits")
    assert "\n" not in str(error.value)


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", draw_digits())
    command = ["moving-mnist", str(tmp_path / "digits.npy"), str(tmp_path / "out.npy"), "--videos", "3"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert np.load(tmp_path / "out.npy").shape == (NUM_FRAMES, 3, SIZE, SIZE)
    with pytest.raises(UserError, match="must end in"):
        generate(draw_digits(), str(tmp_path / "out"))
