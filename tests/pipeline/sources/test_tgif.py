from __future__ import annotations

import logging
from pathlib import Path

import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import list_videos
from tests.pipeline.sources.fixtures import shard_in_process, source_config, write_tgif


def source(folder: Path, **keys: object) -> SourceConfig:
    return SourceConfig.model_validate({"type": "tgif", "url": str(folder), **keys})


def test_clips_carry_their_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "tgif"
    write_tgif(folder, num_frames=8, splits=True)
    (folder / "gifs" / "tumblr_m1o1_500.gif").unlink()
    (folder / "gifs" / "mine.gif").write_bytes(b"no caption")
    config = source_config(tmp_path, {"type": "tgif", "url": str(folder), "split_files": "splits"})
    with caplog.at_level(logging.WARNING):
        found = shard_in_process(config)
    assert "1 of the 6 GIFs of tgif-v1.0.tsv are missing" in caplog.text
    assert "skipped 1 GIFs" in caplog.text
    texts = {split: {described["text"] for described in found.described(split)} for split in ("train", "val")}
    assert texts == {"train": {"caption 0", "caption 2", "caption 3"}, "val": {"caption 4", "caption 5"}}
    (first,) = {str(d["metadata"]) for d in found.described("train") if d["text"] == "caption 0"}
    assert first == "{'captions': ['caption 0', 'another caption']}"
    assert found.excluded() == {}


def test_without_split_files_a_hash_decides(tmp_path: Path) -> None:
    write_tgif(tmp_path, 3, num_frames=2)
    assert [video.split for video in list_videos(source(tmp_path))] == [None] * 3


def test_lists_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    write_tgif(tmp_path, 2, num_frames=2)
    with pytest.raises(UserError, match=r"none\.tsv does not exist; set data\.source\.captions"):
        list(list_videos(source(tmp_path, captions="none.tsv")))
    with pytest.raises(UserError, match=r"train\.txt does not exist; set data\.source\.split_files"):
        list(list_videos(source(tmp_path, split_files="splits")))
    (tmp_path / "bad.tsv").write_text("http://a/b.gif no tab\n")
    with pytest.raises(UserError, match=r"bad\.tsv, line 1: no tab"):
        list(list_videos(source(tmp_path, captions="bad.tsv")))
    (tmp_path / "other.tsv").write_text("http://a/b.gif\ta caption\n")
    with pytest.raises(UserError, match=r"none of the 1 GIFs of other\.tsv lies below"):
        list(list_videos(source(tmp_path, captions="other.tsv")))
