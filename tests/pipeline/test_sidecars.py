from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clipmill.config import SourceConfig
from clipmill.pipeline.fetch import ExcludedVideo
from clipmill.pipeline.sidecars import read_sidecars
from clipmill.pipeline.sources import list_videos
from tests.pipeline.corpus import make_plan, video_bytes
from tests.pipeline.sources.fixtures import Sharded, shard_in_process, source_config


def write(folder: Path, files: dict[str, bytes | str | dict[str, Any] | None]) -> None:
    """Files by name; None is a video."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = video_bytes(number, 4)
        elif isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def sharded(tmp_path: Path, files: dict[str, Any], **source: Any) -> Sharded:
    write(tmp_path / "source", files)
    return shard_in_process(source_config(tmp_path, {"url": str(tmp_path / "source"), **source}))


def described(found: Sharded) -> dict[str, tuple[Any, Any, Any]]:
    """Text, label and metadata by source."""
    return {clip["source"]: (clip["text"], clip["label"], clip["metadata"]) for clip in found.described("train")}


def test_clips_carry_what_the_files_beside_a_video_say(tmp_path: Path) -> None:
    found = sharded(
        tmp_path,
        {
            "cats/a.mp4": None,
            "cats/a.txt": "\ufeffA cat jumps.\n",
            "cats/a.json": {"caption": "another caption", "license": "cc", "score": float("nan")},
            "cats/b.mp4": None,
            "cats/b.json": {"caption": ["A cat sleeps.", "It sleeps."], "label": "sleep"},
            "cats/c.mp4": None,
            "cats/c.json": {"text": "A cat eats.", "label": 3},
            "cats/d.take.2.MOV": None,
            "cats/d.take.2.TXT": "A cat runs.",
            "cats/d.take.txt": "of another video",
            "cats/e": None,
            "cats/e.txt": "A cat walks.",
            "cats/f.mp4": None,
            "f.txt": "in another folder",
            "cats/g.mp4": None,
            "cats/g.json": {},
            "cats/g.txt": "",
        },
    )
    assert found.excluded() == {}
    assert described(found) == {
        "cats/a.mp4": ("A cat jumps.", "cats", {"caption": "another caption", "license": "cc", "score": None}),
        "cats/b.mp4": ("A cat sleeps.", "sleep", {"caption": ["A cat sleeps.", "It sleeps."]}),
        "cats/c.mp4": ("A cat eats.", "3", None),
        "cats/d.take.2.MOV": ("A cat runs.", "cats", None),
        "cats/e": ("A cat walks.", "cats", None),
        "cats/f.mp4": (None, "cats", None),
        "cats/g.mp4": (None, "cats", None),
    }


def test_sidecars_are_read_only_as_far_as_they_are_asked_for(tmp_path: Path) -> None:
    files = {"cats/a.mp4": None, "cats/a.txt": "text", "cats/a.json": {"caption": "c", "label": "l", "k": 1}}
    assert described(sharded(tmp_path / "1", files, sidecars=[])) == {"cats/a.mp4": (None, "cats", None)}
    assert described(sharded(tmp_path / "2", files, sidecars=["txt"])) == {"cats/a.mp4": ("text", "cats", None)}
    assert described(sharded(tmp_path / "3", files, sidecars=["json"])) == {"cats/a.mp4": ("c", "l", {"k": 1})}
    found = described(sharded(tmp_path / "4", files, label="none"))
    assert found == {"cats/a.mp4": ("text", None, {"caption": "c", "label": "l", "k": 1})}


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.json", "no json", "a.json is not JSON; correct or remove it, or set data.source.sidecars=[txt]"),
        ("a.json", "[1]", "a.json is not a JSON object; "),
        ("a.json", '{"caption": {"en": "x"}}', "a.json has a caption or label that is an object, not one value"),
        ("a.json", '{"label": "\\ud83d"}', "a.json has a caption or label that holds half a character"),
        ("a.json", "[" * 100_000, "a.json is not JSON; "),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8; correct or remove it, or set data.source.sidecars=[json]"),
        ("a.txt", b"x" * (2**20 + 1), "a.txt has more than 1048576 bytes; "),
    ],
)
def test_a_bad_sidecar_costs_its_video(tmp_path: Path, name: str, content: bytes | str, cause: str) -> None:
    found = sharded(tmp_path, {"a.mp4": None, "b.mp4": None, name: content})
    assert found.excluded().keys() == {"a.mp4"}
    assert found.excluded()["a.mp4"].startswith(cause)
    assert described(found).keys() == {"b.mp4"}


def test_a_sidecar_that_vanished_costs_its_video(tmp_path: Path) -> None:
    write(tmp_path / "source", {"a.mp4": None, "a.txt": "text"})
    config = source_config(tmp_path, {"url": str(tmp_path / "source")})
    (video,) = make_plan(config).unit("train", 0).videos
    assert video.sidecars == ".txt"
    assert read_sidecars(config.data, video).text == "text"
    (tmp_path / "source" / "a.txt").unlink()
    with pytest.raises(ExcludedVideo, match=r"a\.txt is missing since it was planned"):
        read_sidecars(config.data, video)


def test_sidecars_of_videos_are_no_other_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.mp4": None, "a.txt": "x", "a.json": {}, "a.srt": "x", "b.txt": "x", "a.mp4.txt": "x", "a-1.mp4": None},
    )
    others: Counter[str] = Counter()
    videos = {video.name: video.sidecars for video in list_videos(SourceConfig(url=str(tmp_path)), others)}
    assert videos == {"a.mp4": ".json .txt", "a-1.mp4": None}
    assert others == {".srt": 1, ".txt": 2}
    others.clear()
    list(list_videos(SourceConfig(url=str(tmp_path), sidecars=()), others))
    assert others == {".srt": 1, ".txt": 3, ".json": 1}


def test_a_sidecar_may_have_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    for name, content in ((b"caf\xe9.mp4", video_bytes(1, 4)), (b"caf\xe9.txt", b"coffee")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(content)
    found = shard_in_process(source_config(tmp_path / "run", {"url": str(tmp_path)}))
    assert described(found)["caf\\xe9.mp4"][0] == "coffee"


def test_the_videos_of_a_folder_can_be_one_origin(tmp_path: Path) -> None:
    names = [f"{kind}/take{take}/{number}.mp4" for kind in "ab" for take in range(6) for number in range(3)]
    write(tmp_path / "source", dict.fromkeys([*names, "x.mp4", "y.mp4"]))
    source = {"url": str(tmp_path / "source"), "group": "parent_folder"}
    plan = make_plan(source_config(tmp_path, source, val_fraction=0.4))
    folders = {
        split: {
            str(Path(video.url).parent)
            for number in range(plan.num_units(split))
            for video in plan.unit(split, number).videos
        }
        - {"."}
        for split in ("train", "val")
    }
    assert len(folders["train"]) + len(folders["val"]) == 12
    assert not folders["train"] & folders["val"]
    assert folders["val"]
    groups = {video.name: video.group for video in list_videos(SourceConfig.model_validate(source))}
    assert groups["x.mp4"] is groups["y.mp4"] is None
