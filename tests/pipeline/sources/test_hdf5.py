from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import list_videos, read_array
from clipmill.pipeline.sources.multivideo import KeptFiles
from clipmill.pipeline.sources.record import DamagedVideo
from clipmill.video import Limits
from tests.pipeline.corpus import make_plan
from tests.pipeline.sources.fixtures import random_frames, shard_in_process, source_config, write_hdf5

LENGTHS = {"train": [9, 4, 3, 6], "test": [5, 8]}


def source(path: Path, **keys: object) -> dict[str, object]:
    return {"type": "hdf5", "url": str(path), **keys}


def test_clips_and_actions_are_bit_exact(tmp_path: Path) -> None:
    path = tmp_path / "in" / "robot.hdf5"
    write_hdf5(path, LENGTHS)
    found = shard_in_process(source_config(tmp_path, source(path)))
    assert found.excluded() == {}
    for split, part, seed in (("train", "train", 0), ("val", "test", 100)):
        starts = np.cumsum([0, *LENGTHS[part]])
        rows = np.arange(3 * starts[-1], dtype=np.float32).reshape(-1, 3)
        expected = {
            f"robot.hdf5#{part}/{i}:{first}": (i, length, first)
            for i, length in enumerate(LENGTHS[part])
            for first in range(0, length - 3, 4)
        }
        clips, actions = found.clips(split), found.actions(split)
        assert clips.keys() == expected.keys()
        for name, (i, length, first) in expected.items():
            np.testing.assert_array_equal(clips[name], random_frames(seed + i, length)[first : first + 4])
            np.testing.assert_array_equal(actions[name], rows[starts[i] + first :][:4])
    assert sum(record["num_short"] for record in found.records["train"]) == 1


def test_frames_of_another_size_are_resized_like_any_video(tmp_path: Path) -> None:
    path = tmp_path / "small.h5"
    write_hdf5(path, {"train": [4]}, size=32, actions=False)
    found = shard_in_process(source_config(tmp_path, source(path)))
    ((clip,), (described,)) = list(found.clips("train").values()), found.described("train")
    assert clip.shape == (4, 64, 64, 3)
    assert abs(clip.astype(float).mean() - random_frames(0, 4, 32).mean()) < 2
    assert described["fps"] == 10


def test_a_lone_part_is_split_by_hash(tmp_path: Path) -> None:
    path = tmp_path / "lone.hdf5"
    write_hdf5(path, {"train": [1] * 40}, size=8)
    plan = make_plan(source_config(tmp_path, source(path), val_fraction=0.5))
    sizes = {
        split: sum(len(plan.unit(split, n).videos) for n in range(plan.num_units(split))) for split in ("train", "val")
    }
    assert sizes["train"] + sizes["val"] == 40
    assert min(sizes.values()) > 5


def test_a_damaged_part_costs_its_video(tmp_path: Path) -> None:
    path = tmp_path / "damaged.hdf5"
    with h5py.File(path, "w") as file:  # a checksum a chunk, a chunk a video
        frames = np.concatenate([random_frames(i, 4) for i in range(3)])
        file.create_dataset("train_data", data=frames, chunks=(4, 64, 64, 3), fletcher32=True)
        file["train_idx"] = [0, 4, 8]
        place = file["train_data"].id.get_chunk_info(1).byte_offset
    data = bytearray(path.read_bytes())
    data[place + 100] ^= 1
    path.write_bytes(data)
    found = shard_in_process(source_config(tmp_path, source(path)))
    assert len(found.clips("train")) == 2
    ((name, cause),) = found.excluded().items()
    assert name == "damaged.hdf5#train/1"
    assert cause.startswith("cannot read: ")


def write(path: Path, **datasets: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values


FRAMES = np.zeros((6, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no HDF5"), "is not a readable HDF5 file"),
        (lambda path: write(path, images=FRAMES), r"holds neither train_data .* \(found: images\)"),
        (lambda path: write(path, train_data=FRAMES), "holds train_data but no dataset train_idx"),
        (lambda path: write(path, train_data=FRAMES / 2, train_idx=np.arange(2)), r"is float64 \[6, 8, 8, 3\]"),
        (lambda path: write(path, train_data=FRAMES, train_idx=np.array([0, 6])), "within the 6 frames"),
        (lambda path: write(path, train_data=FRAMES, train_idx=np.array([3, 0])), "must increase"),
        (lambda path: write(path, train_data=FRAMES, train_idx=np.zeros(0, int)), "holds no video"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
    ],
)
def test_another_layout_is_one_clear_line(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "file.hdf5")
    with pytest.raises(UserError, match=message) as error:
        list(list_videos(SourceConfig.model_validate(source(tmp_path / "file.hdf5"))))
    assert "\n" not in str(error.value)


def test_a_file_that_promises_terabytes_costs_that_video_alone(tmp_path):
    path = tmp_path / "bomb.hdf5"
    with h5py.File(path, "w") as file:
        frames = file.create_dataset("train_data", (10**9, 64, 64, 3), np.uint8, chunks=(16, 64, 64, 3))
        frames[:32] = 1
        file["train_idx"] = np.array([0, 16, 32])
    config = SourceConfig.model_validate(source(path))
    first, second, bomb = list_videos(config)
    limits = Limits(60, 2**28, 60)
    kept = KeptFiles(tmp_path / "kept")
    for video, cause in ((first, None), (bomb, "memory limit reached"), (second, None)):
        arguments = (config, str(path), video.member, video.bytes, kept, limits)
        if cause is None:
            assert read_array(*arguments).frames.shape == (16, 64, 64, 3)
        else:
            with pytest.raises(DamagedVideo, match=cause):
                read_array(*arguments)


def _external(file):
    file.create_dataset("train_data", (4, 2, 2, 3), np.uint8, external=[("secret.bin", 0, 48)])


def _link(file):
    file["train_data"] = h5py.ExternalLink("secret.hdf5", "frames")


def _virtual(file):
    layout = h5py.VirtualLayout((4, 2, 2, 3), np.uint8)
    layout[:] = h5py.VirtualSource("secret.hdf5", "frames", (4, 2, 2, 3))
    file.create_virtual_dataset("train_data", layout)


@pytest.mark.parametrize("make", [_external, _link, _virtual])
def test_a_file_that_points_at_other_files_is_refused(tmp_path, make):
    with h5py.File(tmp_path / "file.hdf5", "w") as file:
        make(file)
        file["train_idx"] = np.array([0, 2])
    with pytest.raises(UserError, match="train_data"):
        list(list_videos(SourceConfig.model_validate(source(tmp_path / "file.hdf5"))))


def test_what_brings_down_its_reader_twice_is_the_files_fault(tmp_path, monkeypatch):
    write_hdf5(tmp_path / "file.hdf5", LENGTHS)
    config = SourceConfig.model_validate(source(tmp_path / "file.hdf5"))
    video = next(iter(list_videos(config)))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "import h5py\n"
        "if 'isolated_child' in ' '.join(sys.orig_argv):\n"
        "    h5py.File = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DamagedVideo, match=r"crashed \(SIGSEGV\)"):
        read_array(
            config, str(tmp_path / "file.hdf5"), video.member, video.bytes, KeptFiles(tmp_path), Limits(9, 2**29, 9)
        )
