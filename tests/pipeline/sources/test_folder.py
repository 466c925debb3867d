from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.plan import load_plan
from clipmill.pipeline.sources import list_videos
from tests.pipeline.corpus import video_bytes
from tests.pipeline.sources.fixtures import shard_in_process, source_config


def touch(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_lists_videos_by_ending_with_labels(tmp_path):
    for name in ["b/two.MOV", "a/one.mp4", "top.webm", "a/deep/three.gif", "a/notes.txt", "a/.hidden.mp4", ".x/y.mp4"]:
        touch(tmp_path / name)
    found = list(list_videos(SourceConfig(url=str(tmp_path))))
    assert {video.name: video.label for video in found} == {
        "a/one.mp4": "a",
        "a/deep/three.gif": "deep",
        "b/two.MOV": "b",
        "top.webm": None,
    }
    assert all(video.bytes == 1 and video.actions is None for video in found)
    assert found == list(list_videos(SourceConfig(url=f"file://{tmp_path}/")))
    assert {video.label for video in list_videos(SourceConfig(url=str(tmp_path), label="none"))} == {None}


def test_names_the_actions_beside_a_video(tmp_path):
    touch(tmp_path / "a" / "one.take.mp4")
    (video,) = list_videos(SourceConfig(url=str(tmp_path), actions_suffix=".actions.npy"))
    assert video.actions == "a/one.take.actions.npy"


@pytest.mark.timeout(20)
def test_folders_and_fifos_are_not_videos(tmp_path):
    touch(tmp_path / "good.mp4")
    touch(tmp_path / "folder.mp4" / "inner.mp4")
    os.mkfifo(tmp_path / "endless.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    assert [video.name for video in list_videos(SourceConfig(url=str(tmp_path)))] == [
        "folder.mp4/inner.mp4",
        "good.mp4",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "is a file"),
        (lambda path: path.mkdir(), "holds no video; name another folder"),
        (
            lambda path: [touch(path / name) for name in ("a.txt", "b.TXT", "c.json", "README", ".git/config")],
            r"holds no video; it holds 2 \.txt, 1 without an extension, 1 \.json; name another folder",
        ),
    ],
)
def test_a_source_without_videos_is_the_users_mistake(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        list(list_videos(SourceConfig(url=str(tmp_path / "source"))))


def test_an_unset_source_is_the_users_mistake():
    with pytest.raises(UserError, match=r"data\.source\.url is empty"):
        list(list_videos(SourceConfig()))


def test_the_other_files_of_a_folder_are_counted_and_no_video(tmp_path, caplog):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.MP4").write_bytes(video_bytes(1, 8))
    (tmp_path / "source" / "noending").write_bytes(video_bytes(2, 8))
    (tmp_path / "source" / "take.0001").write_bytes(video_bytes(3, 8))
    Image.new("RGB", (8, 8)).save(tmp_path / "source" / "thumbnail.png")
    for name in ("a.txt", "b.txt", "c.npy", "_SUCCESS"):
        (tmp_path / "source" / name).write_bytes(b"")
    caplog.set_level("INFO")
    config = source_config(tmp_path, {"url": str(tmp_path / "source")})
    found = shard_in_process(config)
    assert found.excluded() == {}
    assert {described["source"] for described in found.described("train")} == {"one.MP4", "noending", "take.0001"}
    assert "skipped files that are not videos: 2 .txt, 1 without an extension, 1 .npy, 1 .png" in caplog.text
    assert load_plan(config).other_files == {".txt": 2, ".npy": 1, ".png": 1, "": 1}


def test_files_that_may_not_be_read_are_videos_only_by_name(tmp_path, monkeypatch):
    touch(tmp_path / "secret")
    touch(tmp_path / "one.mp4")

    def refuse(url, num_bytes):
        raise PermissionError(url)

    monkeypatch.setattr("clipmill.storage.read_start", refuse)
    others = Counter()
    assert [video.name for video in list_videos(SourceConfig(url=str(tmp_path)), others)] == ["one.mp4"]
    assert others == {"": 1}


def test_animated_pictures_are_videos_and_still_ones_are_not(tmp_path):
    pictures = [Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)) for i in range(3)]
    for ending in ("png", "webp", "gif"):
        pictures[0].save(tmp_path / f"moving.{ending}", save_all=True, append_images=pictures[1:])
        pictures[0].save(tmp_path / f"still.{ending}")
    found = {video.name for video in list_videos(SourceConfig(url=str(tmp_path)))}
    assert found == {"moving.png", "moving.webp", "moving.gif", "still.gif"}  # a GIF says so only at its end


def test_a_name_that_is_not_utf8_is_a_name(tmp_path):
    folder = os.fsencode(tmp_path / "source")
    names = [b"ok.mp4", b"caf\xe9.mp4", b"caf\\xe9.mp4", b"\xff\xfe/deep\x80.mp4", "é.mp4".encode()]
    for number, name in enumerate(names):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(video_bytes(number, 8))
    found = shard_in_process(source_config(tmp_path, {"url": str(tmp_path / "source")}))
    assert found.excluded() == {}
    assert {described["source"]: described["label"] for described in found.described("train")} == {
        "ok.mp4": None,
        "caf\\xe9.mp4": None,
        "caf\\x5cxe9.mp4": None,
        "\\xff\\xfe/deep\\x80.mp4": "\\xff\\xfe",
        "é.mp4": None,
    }
