from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import list_videos
from clipmill.pipeline.sources.record import DamagedVideo
from clipmill.pipeline.sources.tfrecord import index_records, masked_crc32c, read_features, read_record
from tests.pipeline.sources.fixtures import (
    bair_actions,
    bair_frames,
    bair_record,
    framed,
    shard_in_process,
    source_config,
    write_bair,
)

TRAIN = "softmotion30_44k/train/traj_0_to_2.tfrecords"
TEST = "softmotion30_44k/test/traj_100_to_101.tfrecords"


def source(folder: Path, **keys: object) -> dict[str, object]:
    return {"type": "bair", "url": str(folder), **keys}


def test_the_checksum_is_tensorflows() -> None:
    # CRC-32C of nine digits is the check value of its catalogue entry; the mask rotates by 15 and adds a constant.
    assert masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32


def test_both_cameras_are_listed_by_record(tmp_path: Path) -> None:
    write_bair(tmp_path, num_frames=2)
    videos = list(list_videos(SourceConfig.model_validate(source(tmp_path, camera="both"))))
    assert [(video.name, video.split) for video in videos] == [(TEST, "val")] * 4 + [(TRAIN, "train")] * 6
    assert len({video.identity for video in videos}) == 10
    assert [video.group for video in videos[::2]] == [video.group for video in videos[1::2]]  # one scene, one split
    assert len({video.group for video in videos}) == 5
    assert [video.member.partition("/")[2] for video in videos[:2]] == ["image_main", "image_aux1"]
    (only,) = {video.member.partition("/")[2] for video in list_videos(SourceConfig.model_validate(source(tmp_path)))}
    assert only == "image_aux1"


def test_clips_and_actions_are_those_of_the_records(tmp_path: Path) -> None:
    write_bair(tmp_path / "bair", num_frames=9)
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "bair", camera="both", array_fps=5)))
    assert found.excluded() == {}
    offset = len(framed(bair_record(0, 9)))
    expected = {
        f"{TRAIN}#{i}@{i * offset}/{camera}:{first}": (bair_frames(i, camera, 9), bair_actions(i, 9), first)
        for i in range(3)
        for camera in ("image_main", "image_aux1")
        for first in (0, 4)
    }
    clips, actions = found.clips("train"), found.actions("train")
    assert clips.keys() == actions.keys() == expected.keys()
    for name, (frames, rows, first) in expected.items():
        np.testing.assert_array_equal(clips[name], frames[first : first + 4])
        np.testing.assert_array_equal(actions[name], rows[first : first + 4])
    assert len(found.clips("val")) == 8
    assert {described["fps"] for described in found.described("val")} == {5.0}


def test_a_damaged_record_costs_itself_and_a_cut_file_its_end(tmp_path: Path) -> None:
    train, test = write_bair(tmp_path / "bair", num_frames=4)
    record_bytes = train.stat().st_size // 3
    data = bytearray(train.read_bytes())
    data[record_bytes + record_bytes // 2] ^= 1
    train.write_bytes(data)
    test.write_bytes(test.read_bytes()[:-1000])
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "bair")))
    assert [name.split("#")[1][0] for name in sorted(found.clips("train"))] == ["0", "2"]
    assert [name.split("#")[1][0] for name in found.clips("val")] == ["0"]
    offset = test.stat().st_size - (record_bytes - 1000)
    assert found.excluded() == {
        f"{TRAIN}#1@{record_bytes}/image_aux1": f"the checksum of the record at byte {record_bytes} differs",
        f"{TEST}#1@{offset}/image_aux1": (
            f"the file ends within the record at byte {offset}: {record_bytes - 1000} of {record_bytes} bytes are there"
        ),
    }


def test_a_damaged_length_costs_the_rest_of_the_file(tmp_path: Path) -> None:
    train, _ = write_bair(tmp_path / "bair", num_frames=4)
    record_bytes = train.stat().st_size // 3
    data = bytearray(train.read_bytes())
    data[record_bytes] ^= 1
    train.write_bytes(data)
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "bair")))
    assert [name.split("#")[1][0] for name in found.clips("train")] == ["0"]
    (cause,) = found.excluded().values()
    assert (
        cause == f"the file is damaged in the length of the record at byte {record_bytes}; what follows cannot be read"
    )


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (b"\xff\xff\xff", "not a tf.train.Example"),
        (b"", "no frame of image_aux1"),
        (bair_record(1, 2).replace(b"1/action", b"7/action"), "has no 1/action"),
        (bair_record(1, 3).replace(b"1/image_aux1", b"9/image_aux1"), "has no 1/image_aux1/encoded"),
    ],
)
def test_a_record_of_something_else_is_excluded_with_its_cause(tmp_path: Path, record: bytes, cause: str) -> None:
    path = tmp_path / "bair" / "train" / "one.tfrecords"
    path.parent.mkdir(parents=True)
    path.write_bytes(framed(record))
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "bair")))
    assert [cause in found_cause for found_cause in found.excluded().values()] == [True]


def test_records_are_found_by_their_headers_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(framed(b"one") + framed(b"") + framed(b"three" * 100) + struct.pack("<Q", 9))
    with path.open("rb") as file:
        places = list(index_records(file, path.stat().st_size))
        assert [read_record(file, *place) for place in places[:3]] == [b"one", b"", b"three" * 100]
        with pytest.raises(DamagedVideo, match="ends within the record at byte 551"):
            read_record(file, *places[3])
    assert len(places) == 4
    assert sorted(read_features(bair_record(0, 1))) == [
        f"0/{name}" for name in ("action", "endeffector_pos", "image_aux1/encoded", "image_main/encoded")
    ]


def test_a_folder_without_records_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no video \(files ending in tfrecords\)"):
        list(list_videos(SourceConfig.model_validate(source(tmp_path))))
