from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.sources import list_videos
from clipmill.shards.manifest import SPLITS
from clipmill.stages import run_stage
from tests.pipeline.corpus import make_plan
from tests.pipeline.sources.fixtures import Sharded, shard_in_process, source_config
from tests.pipeline.sources.lerobot_files import (
    CAMERAS,
    LENGTHS,
    SIZE,
    colours,
    episodes_path,
    rows,
    table,
    write_v2,
    write_v3,
)

CLIP = {"num_frames": 4, "resolution": list(SIZE)}


def source(folder: Path, **keys: object) -> dict[str, object]:
    return {"type": "lerobot", "url": str(folder), **keys}


def listed(folder: Path, **keys: object) -> list[Any]:
    return list(list_videos(SourceConfig.model_validate(source(folder, **keys))))


def shard(tmp_path: Path, folder: Path, clip: dict[str, object] = CLIP, **keys: object) -> Sharded:
    return shard_in_process(source_config(tmp_path, source(folder, **keys), clip=clip))


def check_clips(found: Sharded, episodes: tuple[int, ...], width: int, clip: dict[str, Any] = CLIP) -> None:
    """Every clip of these episodes shows its frames and brings the rows of just those frames."""
    stride = clip.get("frame_stride", 1)
    span = (clip["num_frames"] - 1) * stride + 1
    wanted = {
        (episode, camera, first)
        for episode in episodes
        for camera in CAMERAS
        for first in range(0, LENGTHS[episode] - span + 1, clip["num_frames"] * stride)
    }
    seen = set()
    for clip_frames, clip_rows, described in zip(
        found.clips("train").values(), found.actions("train").values(), found.described("train"), strict=True
    ):
        episode, camera = (described["metadata"][key] for key in ("episode", "camera"))
        seen.add((episode, camera, described["first_frame"]))
        assert described["text"] == f"task {episode % 2}"
        numbers = described["first_frame"] + stride * np.arange(clip["num_frames"])
        np.testing.assert_array_equal(clip_rows, rows(episode, width)[numbers])
        assert np.abs(clip_frames.mean(axis=(1, 2)) - colours(episode, camera)[numbers]).max() < 4
    assert seen == wanted


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_each_camera_of_an_episode_is_a_video_with_its_task_and_rows(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    found = shard(tmp_path, write(tmp_path / "in"), actions=["action", "observation.state"])
    assert found.excluded() == {}
    check_clips(found, (0, 1, 2, 3), 5)
    videos = [video for record in found.records["train"] for video in record["videos"]]
    assert sorted(video["num_frames"] for video in videos) == sorted(LENGTHS * 2)
    assert not any(video["truncated"] for video in videos)


def test_rows_follow_the_frames_that_a_stride_takes(tmp_path: Path) -> None:
    clip = {**CLIP, "frame_stride": 2}
    check_clips(shard(tmp_path, write_v3(tmp_path / "in"), clip), (0, 1, 2, 3), 2, clip)


def test_the_stage_makes_clips_with_actions(embedded: None, tmp_path: Path) -> None:
    config = source_config(tmp_path, source(write_v3(tmp_path / "in"), cameras=CAMERAS[1]), clip=CLIP)
    summary = run_stage("shard", config)
    assert summary is not None
    assert (summary["videos"], summary["clips"], summary["with_actions"], summary["failed"]) == (4, 11, 4, 0)


def test_lerobots_own_package_writes_what_we_read(tmp_path: Path) -> None:
    lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    features: dict[str, Any] = {
        "action": {"dtype": "float32", "shape": (2,), "names": None},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
        **{camera: {"dtype": "video", "shape": (*SIZE, 3), "names": None} for camera in CAMERAS},
    }
    dataset = lerobot.LeRobotDataset.create("a/b", fps=30, features=features, root=tmp_path / "in", vcodec="h264")
    for episode, num_frames in enumerate(LENGTHS):
        for number in range(num_frames):
            frame: dict[str, Any] = {
                "action": rows(episode, 2)[number],
                "observation.state": rows(episode, 5)[number, 2:],
            }
            for camera in CAMERAS:
                frame[camera] = np.broadcast_to(colours(episode, camera)[number].astype(np.uint8), (*SIZE, 3)).copy()
            dataset.add_frame({**frame, "task": f"task {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()
    check_clips(shard(tmp_path, tmp_path / "in"), (0, 1, 2, 3), 2)


def test_cameras_and_actions_can_be_chosen(tmp_path: Path) -> None:
    folder = write_v2(tmp_path / "in")
    assert len(listed(folder)) == 8
    chosen = listed(folder, cameras=[CAMERAS[1]], actions=[])
    assert [json.loads(video.metadata)["camera"] for video in chosen] == [CAMERAS[1]] * 4
    assert {video.actions for video in chosen} == {None}
    with pytest.raises(UserError, match=r"cameras: the data set has no 'front' .it has observation.images.top, obs"):
        listed(folder, cameras=["front"])
    with pytest.raises(UserError, match=r"actions: the data set has no 'velocity' .it has action, observation.state"):
        listed(folder, actions="velocity")
    edit_info(folder, lambda info: info["features"][CAMERAS[0]]["info"].update({"video.is_depth_map": True}))
    assert len(listed(folder)) == 4
    assert len(listed(folder, cameras=CAMERAS)) == 8
    edit_info(folder, lambda info: info["features"].pop("action"))
    assert {video.actions for video in listed(folder)} == {None}


def planned(tmp_path: Path, folder: Path, **data: Any) -> dict[str, list[PlannedVideo]]:
    plan = make_plan(source_config(tmp_path, source(folder), **data))
    return {
        split: [video for number in range(plan.num_units(split)) for video in plan.unit(split, number).videos]
        for split in SPLITS
    }


def episodes_of(videos: list[PlannedVideo]) -> list[int]:
    return [json.loads(video.metadata or "")["episode"] for video in videos]


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_all_cameras_of_an_episode_are_in_one_split(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    videos = planned(tmp_path, write(tmp_path / "in"), val_fraction=0.5)
    train, val = (set(episodes_of(videos[split])) for split in SPLITS)
    assert train | val == {0, 1, 2, 3}
    assert train.isdisjoint(val)
    assert len(videos["train"]) == 2 * len(train)


def test_splits_that_the_data_set_names_are_kept(tmp_path: Path) -> None:
    folder = write_v2(tmp_path / "in")
    edit_info(folder, lambda info: info.update(splits={"train": "0:3", "test": "3:4"}))
    videos = planned(tmp_path, folder)
    assert sorted(episodes_of(videos["train"])) == [0, 0, 1, 1, 2, 2]
    assert episodes_of(videos["val"]) == [3, 3]


def test_the_episodes_of_a_file_follow_each_other_in_the_plan(tmp_path: Path) -> None:
    videos = planned(tmp_path, write_v3(tmp_path / "in"))["train"]
    urls = [video.url for video in videos]
    assert len({*urls}) == 4
    assert sum(one != other for one, other in pairwise(urls)) == 3


def edit_info(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info))


def edit_rows(folder: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Of the episode 1."""
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    pq.write_table(edit(table(1)), path)


def shifted(seconds: float) -> Callable[[pa.Table], pa.Table]:
    def shift(rows_of_episode: pa.Table) -> pa.Table:
        times = pa.array(np.array(rows_of_episode["timestamp"]) + seconds, pa.float32())
        return rows_of_episode.set_column(2, "timestamp", times)

    return shift


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (shifted(0.4 / 30), None),
        (lambda rows_of_episode: rows_of_episode.take(list(range(11, -1, -1))), None),
        (
            shifted(0.6 / 30),
            r"no row of actions within half a period .0\.017 s. of the frame at 0\.000 s; the 12 rows go",
        ),
        (lambda rows_of_episode: rows_of_episode.take([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]), "of the frame at 0.167 s"),
        (
            lambda rows_of_episode: rows_of_episode.slice(0, 10),
            "of the frame at 0.367 s; the 10 rows go from 0.000 to 0.3",
        ),
        (lambda rows_of_episode: rows_of_episode.slice(0, 0), "there are no rows of actions of episode 1"),
        (lambda rows_of_episode: rows_of_episode.drop_columns(["action"]), "the rows of actions have no column action"),
        (lambda rows_of_episode: rows_of_episode.drop_columns(["timestamp"]), "have no column timestamp"),
        (
            lambda rows_of_episode: rows_of_episode.set_column(0, "action", pa.array([[1.0], [1.0, 2.0]] * 6)),
            "the rows of actions cannot be read",
        ),
        (
            lambda rows_of_episode: rows_of_episode.set_column(0, "action", pa.array([None] * 12, pa.float32())),
            "of episode 1 lack a value",
        ),
    ],
)
def test_a_frame_takes_the_nearest_row_or_its_episode_is_excluded(
    tmp_path: Path, edit: Callable[[pa.Table], pa.Table], cause: str | None
) -> None:
    folder = write_v2(tmp_path / "in")
    edit_rows(folder, edit)
    found = shard(tmp_path, folder, actions="action")
    check_clips(found, (0, 1, 2, 3) if cause is None else (0, 2, 3), 2)
    assert sorted(found.excluded()) == (
        [] if cause is None else [f"videos/chunk-000/{camera}/episode_000001.mp4" for camera in CAMERAS]
    )
    for text in found.excluded().values():
        assert re.search(cause or "", text)
        assert "\n" not in text


def test_what_is_missing_or_damaged_costs_its_episode(tmp_path: Path) -> None:
    folder = write_v2(tmp_path / "in")
    (folder / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4").unlink()
    (folder / "data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1 no parquet")
    (folder / "data/chunk-000/episode_000002.parquet").unlink()
    excluded = shard(tmp_path, folder).excluded()
    causes = {name.removeprefix("videos/chunk-000/observation.images."): cause for name, cause in excluded.items()}
    assert causes.pop("top/episode_000000.mp4").endswith("episode_000000.mp4 is missing")
    for camera in ("top", "wrist"):
        assert "the rows of actions cannot be read" in causes.pop(f"{camera}/episode_000001.mp4")
        assert "episode_000002.parquet#2 is missing" in causes.pop(f"{camera}/episode_000002.mp4")
    assert causes == {}


def test_an_episode_whose_recording_was_not_finished_is_excluded(tmp_path: Path) -> None:
    folder = write_v3(tmp_path / "in")
    described = pq.read_table(episodes_path(folder)).to_pylist()
    described[3][f"videos/{CAMERAS[0]}/from_timestamp"] = None
    described[2][f"videos/{CAMERAS[1]}/chunk_index"] = float("nan")
    pq.write_table(pa.Table.from_pylist(described), episodes_path(folder))
    found = shard(tmp_path, folder)
    assert set(found.excluded().values()) == {
        f"meta/episodes does not say where its videos/{camera} is" for camera in CAMERAS
    }
    assert len([video for record in found.records["train"] for video in record["videos"]]) == 6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "meta/info.json").unlink(), "info.json does not exist; set data.source.url to the"),
        (lambda folder: (folder / "meta/info.json").write_text("{"), "is damaged or not of a LeRobot data set"),
        (lambda folder: (folder / "meta/info.json").write_text("[]"), "is damaged or not of a LeRobot data set"),
        (lambda folder: edit_info(folder, lambda info: info.pop("features")), "'features'"),
        (lambda folder: edit_info(folder, lambda info: info.update(codebase_version="v1.6")), "version v1.6; convert"),
        (lambda folder: edit_info(folder, lambda info: info.update(video_path="/etc/{video_key}")), "outside the data"),
        (lambda folder: edit_info(folder, lambda info: info.update(data_path="../{video_key}")), "outside the data"),
        (
            lambda folder: edit_info(folder, lambda info: info.update(video_path="{none}.mp4")),
            "cannot be filled: {none}",
        ),
        (
            lambda folder: edit_info(
                folder, lambda info: [info["features"][camera].update(dtype="image") for camera in CAMERAS]
            ),
            "keeps observation.images.top, observation.images.wrist as single images: convert",
        ),
        (lambda folder: (folder / "meta/episodes.jsonl").unlink(), "episodes.jsonl does not exist"),
        (lambda folder: (folder / "meta/episodes.jsonl").write_text('{"length": 3}\n'), "line 1: not an episode"),
        (lambda folder: (folder / "meta/episodes.jsonl").write_text(""), "holds no video"),
    ],
)
def test_a_damaged_description_is_one_clear_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = write_v2(tmp_path / "in")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        listed(folder)
    assert "\n" not in str(error.value)


def test_damaged_episodes_of_version_3_are_one_clear_line(tmp_path: Path) -> None:
    folder = write_v3(tmp_path / "in")
    episodes_path(folder).write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match="holds no episodes"):
        listed(folder)
