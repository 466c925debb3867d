from __future__ import annotations

import logging
from pathlib import Path

import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import check_source, list_videos
from tests.pipeline.sources.fixtures import shard_in_process, source_config, write_ucf101


def source(folder: Path, **keys: object) -> SourceConfig:
    return SourceConfig.model_validate({"type": "ucf101", "url": str(folder), **keys})


def test_the_official_lists_are_the_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "ucf"
    write_ucf101(folder, num_frames=8)
    extra = folder / "UCF-101" / "YoYo" / "mine.avi"
    extra.write_bytes(b"neither list names it")
    with caplog.at_level(logging.WARNING):
        found = shard_in_process(source_config(tmp_path, {"type": "ucf101", "url": str(folder)}))
    assert "skipped 1 videos that neither list of split 1 names" in caplog.text
    sources = {split: {described["source"] for described in found.described(split)} for split in ("train", "val")}
    assert sources["val"] == {f"UCF-101/{name}/v_{name}_g03_c01.avi" for name in ("ApplyEyeMakeup", "YoYo")}
    assert len(sources["train"]) == 4
    assert {described["label"] for described in found.described("train")} == {"ApplyEyeMakeup", "YoYo"}


def test_the_lists_may_lie_elsewhere(tmp_path: Path) -> None:
    write_ucf101(tmp_path / "ucf", num_frames=2)
    (tmp_path / "ucf" / "ucfTrainTestlist").rename(tmp_path / "lists")
    moved = source(tmp_path / "ucf" / "UCF-101", split_files=str(tmp_path / "lists"))
    assert sorted(video.split for video in list_videos(moved)) == ["train"] * 4 + ["val"] * 2
    for path in (tmp_path / "lists").iterdir():
        path.rename(path.with_name(path.name.replace("01", "03")))
    renamed = source(tmp_path / "ucf", split_files="../lists", split_number=3)
    assert len(list(list_videos(renamed))) == 6


def test_a_list_that_is_missing_or_names_absent_videos_is_one_clear_line(tmp_path: Path) -> None:
    write_ucf101(tmp_path, num_frames=2)
    with pytest.raises(UserError, match=r"trainlist02\.txt does not exist; set data\.source\.split_files"):
        check_source(source(tmp_path, split_number=2))
    (tmp_path / "UCF-101" / "YoYo" / "v_YoYo_g01_c01.avi").unlink()
    with pytest.raises(UserError, match=r"name 1 videos that are not below .*, such as YoYo/v_YoYo_g01_c01\.avi"):
        check_source(source(tmp_path))
