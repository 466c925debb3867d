from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from clipmill import storage
from clipmill.demo import CLASSES, NUM_FRAMES, SIDE, draw_video, generate, video_size
from clipmill.errors import UserError
from clipmill.video import probe
from clipmill.video.decode import read_frames


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    assert generate(str(path), num_videos=12, seed=3)
    return path


def test_each_class_is_a_folder_of_videos_with_actions(folder):
    videos = sorted(folder.rglob("*.mp4"))
    assert len(videos) == 12
    assert {path.parent.name for path in videos} == set(CLASSES)
    for path in videos:
        actions = np.load(path.with_name(f"{path.stem}.actions.npy"))
        assert (actions.dtype, actions.shape) == (np.float32, (NUM_FRAMES, 2))
        info = probe(path)
        assert (info.codec, info.container_frames, info.width, info.height) == ("h264", NUM_FRAMES, SIDE, SIDE)


def test_a_second_call_writes_nothing_and_another_folder_gets_the_same_bytes(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not generate(str(folder), num_videos=12, seed=3)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    generate(str(tmp_path), num_videos=12, seed=3)
    assert contents(tmp_path) == contents(folder)


def test_an_interrupted_call_is_finished_by_the_next(folder, tmp_path, monkeypatch):
    class PulledPlugError(Exception):
        pass

    publish, calls = storage.publish_bytes, []

    def publish_some(url, data):
        if len(calls) == 7:
            raise PulledPlugError
        calls.append(url)
        publish(url, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish_bytes", publish_some)
        with pytest.raises(PulledPlugError):
            generate(str(tmp_path), num_videos=12, seed=3)
    assert generate(str(tmp_path), num_videos=12, seed=3)
    assert contents(tmp_path) == contents(folder)


def test_another_number_seed_or_size_is_refused(folder):
    for change in ({"num_videos": 13}, {"seed": 4}, {"size": (64, 114)}):
        with pytest.raises(UserError, match=r"num_videos 12, seed 3, size \[64, 64\]; remove it"):
            generate(str(folder), **{"num_videos": 12, "seed": 3, **change})


def test_videos_have_the_shape_of_the_clips():
    assert [video_size(size) for size in ((36, 64), (64, 36), (32, 32))] == [(64, 114), (114, 64), (64, 64)]
    discs = [draw_video(seed, CLASSES.index("ball_bouncing"), (64, 114))[1][..., 0] > 150 for seed in range(6)]
    assert np.ptp(np.flatnonzero(np.any(discs, axis=(0, 1, 2)))) > 100  # the ball uses the width, and stays round
    for frames in discs:
        width, height = (np.ptp(np.flatnonzero(frames[0].any(axis))) for axis in (0, 1))
        assert abs(width - height) <= 1


def test_files_hold_what_was_drawn(folder):
    label, frames, actions = draw_video(3, 7)
    path = folder / label / f"{label}_0007.mp4"
    decoded = np.stack([frame for _, frame in read_frames(path, probe(path), (SIDE, SIDE), "crop")])
    assert np.mean((decoded.astype(float) - frames) ** 2) < 60
    saved = np.load(io.BytesIO(path.with_name(f"{label}_0007.actions.npy").read_bytes()))
    np.testing.assert_array_equal(saved, actions)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (64, 114), (114, 64)])
@pytest.mark.parametrize("index", range(2 * len(CLASSES)))
def test_every_video_moves_stays_in_sight_and_is_smooth(index, size):
    label, frames, _ = draw_video(0, index, size)
    assert label == CLASSES[index % len(CLASSES)]
    assert (frames.shape, frames.dtype) == ((NUM_FRAMES, *size, 3), np.uint8)
    bright = frames.max(axis=3) > 150
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    area = bright.sum(axis=(1, 2))
    assert area.min() > 100
    centre = np.stack([(bright * axis).sum(axis=(1, 2)) / area for axis in (x, y)], axis=1)
    speed = np.linalg.norm(np.diff(centre, axis=0), axis=1)
    assert speed.max() < 6 * (size[0] / SIDE) ** 0.5  # a fall from higher up is faster
    assert (frames[0] != frames[-1]).any()


def test_videos_differ_and_follow_from_seed_and_index():
    np.testing.assert_array_equal(draw_video(1, 0)[1], draw_video(1, 0)[1])
    assert (draw_video(1, 0)[1] != draw_video(2, 0)[1]).any()
    assert (draw_video(1, 0)[1] != draw_video(1, len(CLASSES))[1]).any()
