from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import list_videos
from clipmill.pipeline.sources.npy import copy_member
from clipmill.pipeline.sources.record import DamagedVideo
from clipmill.stages import run_stage
from tests.pipeline.sources.fixtures import Sharded, random_frames, shard_in_process, source_config


def source(url: Path, **keys: object) -> dict[str, object]:
    return {"type": "arrays", "url": str(url), **keys}


def listed(url: Path, **keys: object) -> list[Any]:
    return list(list_videos(SourceConfig.model_validate(source(url, **keys))))


def noise(seed: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def save(path: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is not None:
        np.save(path, array)
    else:
        np.savez_compressed(path, **arrays)
    return path


def expect_clips(found: Sharded, videos: dict[str, np.ndarray]) -> None:
    """Every four frames of each video, bit for bit, and nothing else."""
    assert found.excluded() == {}
    clips = found.clips("train")
    expected = {
        f"{name}:{first}": frames[first : first + 4]
        for name, frames in videos.items()
        for first in range(0, len(frames) - 3, 4)
    }
    assert clips.keys() == expected.keys()
    for name, frames in expected.items():
        np.testing.assert_array_equal(clips[name], frames)


def grey(frames: np.ndarray) -> np.ndarray:
    """[T, H, W] as RGB."""
    return np.repeat(frames[..., None], 3, -1)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((9, 64, 64), None),
        ((8, 64, 64, 3), None),
        ((8, 64, 64, 1), None),
        ((3, 8, 64, 64, 3), None),
        ((3, 8, 64, 64, 1), None),
        ((3, 8, 64, 64), "NTHW"),
        ((8, 3, 64, 64), "TNHW"),
        ((3, 8, 3, 64, 64), "NTCHW"),
        ((8, 64, 64, 5), "THWN"),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_layout_is_bit_exact(tmp_path: Path, shape: tuple[int, ...], axes: str | None, order: Any) -> None:
    array = noise(1, *shape)
    save(tmp_path / "in" / "x.npy", np.asarray(array, order=order))
    names = axes or ("THW" if len(shape) == 3 else "NTHWC"[-len(shape) :])
    full = array if "C" in names else array[..., None]
    full_names = names if "C" in names else f"{names}C"
    if "N" not in names:
        full, full_names = full[None], f"N{full_names}"
    full = full.transpose([full_names.index(axis) for axis in "NTHWC"])
    videos = {f"x.npy#{i}": np.broadcast_to(video, (*video.shape[:3], 3)) for i, video in enumerate(full)}
    expect_clips(shard_in_process(source_config(tmp_path, source(tmp_path / "in", axes=axes))), videos)


def test_moving_mnist_is_a_file_of_videos_by_its_second_axis(tmp_path: Path) -> None:
    array = noise(2, 20, 6, 64, 64)
    path = save(tmp_path / "mnist_test_seq.npy", array)
    with pytest.raises(
        UserError, match=r"20 videos of 6 frames .*NTHW.* 6 videos of 20 frames \(TNHW.*set data"
    ) as error:
        listed(path)
    assert "\n" not in str(error.value)
    videos = {f"mnist_test_seq.npy#{i}": grey(array[:, i]) for i in range(6)}
    found = shard_in_process(source_config(tmp_path, source(path, axes="TNHW", array_fps=8)))
    expect_clips(found, videos)
    assert {described["fps"] for described in found.described("train")} == {8.0}


def test_robot_episodes_in_npz_bring_their_actions(embedded: None, tmp_path: Path) -> None:
    for number in range(2):
        frames, actions = random_frames(number, 9), noise(number, 9, 4).astype(np.float64)
        state = noise(number + 9, 9, 2).astype(np.float32)
        save(tmp_path / "in" / f"e{number}.npz", image=frames, action=actions, state=state, reward=np.zeros((9, 1)))
    config = source_config(tmp_path, source(tmp_path / "in"))
    summary = run_stage("shard", config)
    assert summary is not None
    assert (summary["videos"], summary["clips"], summary["with_actions"]) == (2, 4, 2)
    found = shard_in_process(source_config(tmp_path / "2", source(tmp_path / "in", actions=["action", "state"])))
    expect_clips(found, {f"e{i}.npz#0": random_frames(i, 9) for i in range(2)})
    rows = found.actions("train")
    for i in range(2):
        both = np.concatenate([noise(i, 9, 4), noise(i + 9, 9, 2)], axis=1).astype(np.float32)
        np.testing.assert_array_equal(rows[f"e{i}.npz#0:4"], both[4:8])
    without = shard_in_process(source_config(tmp_path / "3", source(tmp_path / "in", actions=[])))
    assert without.records["train"][0]["videos"][0]["actions"] is False


def test_many_videos_in_an_npz_bring_their_own_rows(tmp_path: Path) -> None:
    array, actions = noise(3, 5, 4, 64, 64, 3), noise(4, 5, 4, 2, 2)
    np.savez(tmp_path / "many.npz", arr_0=array, moves=actions)
    config = source_config(tmp_path, source(tmp_path / "many.npz", array_key="arr_0", actions="moves"))
    found = shard_in_process(config)
    expect_clips(found, {f"many.npz#{i}": array[i] for i in range(5)})
    for i in range(5):
        np.testing.assert_array_equal(found.actions("train")[f"many.npz#{i}:0"], actions[i].reshape(4, 4))


def test_any_integers_from_0_to_255_are_pixels(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.npz", image=random_frames(1, 4).astype(np.int64))
    save(tmp_path / "in" / "b.npz", image=random_frames(2, 4).astype(">u2") + 1)
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "in")))
    np.testing.assert_array_equal(found.clips("train")["a.npz#0:0"], random_frames(1, 4))
    assert found.excluded() == {"b.npz#0": "values from 1 to 256; they must lie between 0 and 255"}


def test_a_file_that_is_read_whole_is_copied_once_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {name: noise(number, 6, 4, 64, 64, 3) for number, name in enumerate("abc")}
    for name, array in arrays.items():
        save(tmp_path / "in" / f"{name}.npz", video=array)
    opened: list[str] = []
    original = storage.open_to_read

    def counting(url: str, block_bytes: int = 2**16) -> Any:
        if block_bytes > 2**16:
            opened.append(url)
        return original(url, block_bytes)

    monkeypatch.setattr(storage, "open_to_read", counting)
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "in")))
    expect_clips(found, {f"{name}.npz#{i}": array[i] for name, array in arrays.items() for i in range(6)})
    assert len(found.records["train"]) == 1
    assert len(opened) == 3


def npy(descr: str, shape: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


class Boom:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", b"no array", "not an .npy file"),
        ("x.npy", b"", "not an .npy file"),
        (
            "x.npy",
            npy("'|u1'", "(1000000000000, 64, 64)", b"x"),
            r"\[1000000000000, 64, 64\], 4096000000000000 bytes; 1 are",
        ),
        ("x.npy", npy("'|u1'", "(9223372036854775807, 9223372036854775807, 3)", b"x"), "1 are there"),
        ("x.npy", npy("'|u1'", "(-4, -64, 64)", b"x" * 20000), r"\[-4, -64, 64\]"),
        ("x.npy", npy("'|u1'", "(4, 64", b"x" * 20000), "header is damaged"),
        ("x.npy", npy("'|u1'", "(" * 5000, b"x" * 20000), "header is damaged"),
        ("x.npy", npy("'|O'", "(4, 64, 64)", b"x" * 200000), "Python objects, which are never unpickled"),
        ("x.npy", npy("'|u1'", "(4, 64, 64)", b"x" * 20000, b"\x07\x00"), "not an .npy file|of a version"),
        ("x.npy", npy("'|u1'", "(0, 64, 64)"), "videos without pixels"),
        ("x.npy", npy("'<f4'", "(4, 8, 8)", bytes(1024)), "an array of float32; save integers"),
        (
            "x.npy",
            npy("'|u1'", "(9, 9, 3)", bytes(243)),
            "a picture, which is not a video, or 9 frames of 9 x 3 pixels",
        ),
        ("x.npy", npy("'|u1'", "(9, 9)", bytes(81)), "is ambiguous; set data.source.axes"),
        ("x.npy", npy("'|u1'", "(4, 3, 8, 8)", bytes(768)), "or 4 frames .TCHW.; set data.source.axes"),
        ("x.npz", b"no zip", "not an .npz file, or it is damaged"),
        ("x.npz", npz(a=npy("'|u1'", "(4, 8, 8)", bytes(256)))[:-30], "not an .npz file, or it is damaged"),
        ("x.npz", npz(a=npy("'|u1'", "(4, 8, 8)", bytes(200))), "256 bytes; 200 are there"),
        (
            "x.npz",
            npz(a=npy("'<f4'", "(4,)", bytes(16))),
            r"which array .* .found: a \[4\].; set data.source.array_key",
        ),
        ("x.npz", npz(), "found: nothing"),
    ],
)
def test_what_is_no_array_of_videos_is_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        listed(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([Boom(tmp_path / "boom")] * 64, object).reshape(4, 4, 4), allow_pickle=True)
    with pytest.raises(UserError, match="never unpickled"):
        listed(tmp_path / "x.npy")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"array_key": "none"}, r"no array 'none' .found: image \[4, 8, 8, 3\], aux \[4, 8, 8, 3\]"),
        ({}, "which array holds the videos"),
        ({"array_key": "image", "actions": "velocity"}, "no array 'velocity'"),
        ({"array_key": "image", "axes": "THW"}, r"4 axes, \[4, 8, 8, 3\], for data.source.axes=THW"),
        ({"array_key": "image", "axes": "CTHW"}, "4 channels"),
    ],
)
def test_keys_that_do_not_fit_the_files_are_one_clear_line(
    tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    path = save(tmp_path / "x.npz", image=noise(0, 4, 8, 8, 3), aux=noise(0, 4, 8, 8, 3))
    with pytest.raises(UserError, match=message):
        listed(path, **keys)


@pytest.mark.parametrize("axes", ["THH", "TH", "THWX", "TTHW"])
def test_axes_are_letters(axes: str) -> None:
    with pytest.raises(ValueError, match="must hold T, H and W"):
        SourceConfig.model_validate({"type": "arrays", "axes": axes})


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda path: path.write_bytes(b"PK no zip"), "not an .npz file"),
        (lambda path: save(path, image=random_frames(1, 4) / 255), "an array of float64"),
        (lambda path: save(path, image=random_frames(1, 4), action=np.zeros((4, 1), complex)), "action is complex128"),
    ],
)
def test_a_bad_file_of_a_folder_costs_itself(tmp_path: Path, damage: Callable[[Path], object], cause: str) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "in" / f"{name}.npz", image=random_frames(ord(name), 4))
    damage(tmp_path / "in" / "b.npz")
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "in")))
    assert sorted(found.clips("train")) == ["a.npz#0:0", "c.npz#0:0"]
    assert [(name, cause in text) for name, text in found.excluded().items()] == [("b.npz#0", True)]


def test_an_archive_that_unpacks_to_more_than_the_disk_holds_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(10**6, np.uint8))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    with (tmp_path / "a.npz").open("rb") as file, pytest.raises(DamagedVideo, match="unpacks to 1000128 bytes"):
        copy_member(file, "x", tmp_path / "copy.npy")
