from __future__ import annotations

import os

import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import list_videos


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
        (lambda path: touch(path / "notes.txt"), "holds no video"),
    ],
)
def test_a_source_without_videos_is_the_users_mistake(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        list(list_videos(SourceConfig(url=str(tmp_path / "source"))))


def test_an_unset_source_is_the_users_mistake():
    with pytest.raises(UserError, match=r"data\.source\.url is empty"):
        list(list_videos(SourceConfig()))
