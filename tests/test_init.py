"""`clipmill init`: a config that fits the videos and the machine, or one line that says why there is none."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from clipmill.cli.command import app
from clipmill.config import RunConfig, load_config
from clipmill.demo import generate
from clipmill.errors import UserError
from clipmill.init import choices as choices_module
from clipmill.init import timing
from clipmill.init.choices import Machine, choose
from clipmill.init.survey import OpenedVideo, Survey, survey_videos
from clipmill.pipeline.planning.generation import split_share
from clipmill.preflight import check_later_stages
from clipmill.video.encode import encode_mp4

LAPTOP = Machine(num_cpus=2, num_gpus=0, gpu_name="", gpu_bytes=0, has_bfloat16=False)
SERVER = Machine(num_cpus=64, num_gpus=8, gpu_name="H100", gpu_bytes=80 * 2**30, has_bfloat16=True)


def opened_video(number: int, **facts) -> OpenedVideo:
    name = f"{number:04d}.mp4"
    known = {"label": None, "height": 240, "width": 320, "fps": 25.0, "seconds": 10.0}
    measured = {"decode_seconds_per_frame": 1e-3, "clip_bytes": 1e5}
    return OpenedVideo(name=name, url=f"/videos/{name}", origin=number, **known | measured | facts)


def survey(opened: list[OpenedVideo], num_videos: int | None = None, labels: dict | None = None) -> Survey:
    number = num_videos or len(opened)
    return Survey("/videos", number, number * 10**6, Counter(labels or {None: number}), "", opened, [])


def chosen(found: Survey, machine: Machine = LAPTOP):
    """The choices, and the config that they make."""
    made = choose(found, machine, "runs/x")
    return made, RunConfig.model_validate(made.settings)


@pytest.mark.parametrize(
    ("size", "on_a_laptop"),
    [((240, 320), (56, 72)), ((1080, 1920), (48, 88)), ((1920, 1080), (88, 48)), ((40, 40), (40, 40))],
)
def test_clips_have_the_shape_of_the_videos(size, on_a_laptop):
    found = survey([opened_video(n, height=size[0], width=size[1]) for n in range(30)])
    _, config = chosen(found)
    check_later_stages(config)
    assert config.data.clip.size == on_a_laptop
    _, config = chosen(found, SERVER)
    height, width = config.data.clip.size
    assert abs(height / width - size[0] / size[1]) < 0.12 * size[0] / size[1]
    assert height * width <= min(1.1 * 128**2, size[0] * size[1])


def test_a_server_gets_a_larger_model_that_fits_the_clips():
    _, config = chosen(survey([opened_video(n) for n in range(30)]), SERVER)
    check_later_stages(config)
    assert config.cluster.training_workers == 8
    assert config.prior.model.preset == "100m"
    assert config.prior.training.precision == "bfloat16"


@pytest.mark.parametrize(
    ("facts", "num_frames", "fps"),
    [
        ({"fps": 25.0}, 16, 12),
        ({"fps": 10.0}, 16, None),
        ({"fps": 25.0, "seconds": 1.0}, 16, None),
        ({"fps": 25.0, "seconds": 0.4}, 8, None),
    ],
)
def test_short_videos_get_faster_or_shorter_clips(facts, num_frames, fps):
    _, config = chosen(survey([opened_video(n, **facts) for n in range(30)]))
    assert (config.data.clip.num_frames, config.data.clip.fps) == (num_frames, fps)


def test_videos_of_a_few_frames_are_refused():
    with pytest.raises(UserError, match=r"too short for clips of 4 frames: half of them last 0\.12 s"):
        choose(survey([opened_video(n, seconds=0.12) for n in range(3)]), LAPTOP, "runs/x")


def test_folders_are_classes_where_every_video_lies_in_a_shared_one():
    def is_conditional(labels: list[str | None]) -> bool:
        opened = [opened_video(number, label=label) for number, label in enumerate(labels)]
        _, config = chosen(survey(opened, labels=Counter(labels)))
        assert config.data.source.label == ("parent_folder" if config.prior.model.class_conditional else "none")
        return config.prior.model.class_conditional

    assert is_conditional(["a", "b"] * 4)
    assert not is_conditional(["a", "b"] * 3 + [None, "a"])
    assert not is_conditional([f"take{n}" for n in range(8)])
    assert not is_conditional(["a"] * 8)


def test_few_videos_are_in_both_splits_whatever_chance_says():
    for first in range(20):
        opened = [opened_video(n) for n in range(first, first + 3)]
        _, config = chosen(survey(opened))
        is_val = [split_share(0, each.origin) < config.data.val_fraction for each in opened]
        assert 1 <= sum(is_val) < 3


def test_one_video_is_cut_and_a_short_one_refused():
    made, _ = chosen(survey([opened_video(0, seconds=20.0)]))
    assert [row["split"] for row in made.spans] == ["train", "val"]
    with pytest.raises(UserError, match=r"only video that yields clips, and too short .* lasts 2 s"):
        choose(survey([opened_video(0, seconds=2.0)]), LAPTOP, "runs/x")


def test_large_sources_are_cut_into_shards_for_all_cpus():
    many = survey([opened_video(n, clip_bytes=1e4) for n in range(24)], num_videos=20_000)
    _, config = chosen(many, SERVER)
    assert config.data.shard_bytes < 128 * 2**20
    assert config.evaluate.max_clips == 2048


# ----------------------------------------------------------------------------------------- real files


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "my videos"
    generate(str(folder), num_videos=10)
    (folder / "ball_bouncing" / "broken.mp4").write_bytes(b"no video at all" * 100)
    return folder


def test_a_survey_counts_opens_and_times(labelled):
    found = survey_videos(str(labelled))
    assert (found.num_videos, len(found.opened), len(found.failures)) == (11, 10, 1)
    assert found.failures[0][0] == "ball_bouncing/broken.mp4"
    assert "10 .npy" in found.other_files
    assert {(each.height, each.width, each.fps, each.seconds) for each in found.opened} == {(64, 64, 12.5, 3.2)}
    assert all(each.decode_seconds_per_frame > 0 and each.clip_bytes > 0 for each in found.opened)
    assert found.total_seconds == pytest.approx(32)


def test_the_command_writes_a_config_with_its_reasons_and_an_estimate(labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "_SECONDS_A_MEASUREMENT", 0)
    monkeypatch.setattr("clipmill.init.command.this_machine", lambda: LAPTOP)
    done = CliRunner().invoke(app, ["init", str(labelled), "--json", "--hours", "0.02"], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert (facts["config"], facts["videos"], facts["unreadable"]) == ("my-videos.yaml", 11, 1)
    assert set(facts["expected_seconds"]) == {"shard", "train-vqvae", "tokenize", "train-prior", "sample", "evaluate"}
    assert all(seconds >= 0 for seconds in facts["expected_seconds"].values())
    text = Path("my-videos.yaml").read_text()
    assert "class_conditional: true  # 5 classes" in text
    assert "s a step" in text
    config = load_config(["my-videos.yaml"])
    assert (config.root, config.data.source.url) == ("runs/my-videos", str(labelled))
    with pytest.raises(UserError, match=r"my-videos\.yaml exists"):
        CliRunner().invoke(app, ["init", str(labelled)], catch_exceptions=False)


def test_one_file_becomes_a_table_of_two_parts(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (120, 32, 48, 3), np.uint8)
    (tmp_path / "film.mp4").write_bytes(encode_mp4(frames, 12, 30))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "_SECONDS_A_MEASUREMENT", 0)
    CliRunner().invoke(app, ["init", "film.mp4", "--json"], catch_exceptions=False)
    assert yaml.safe_load(Path("film.yaml").read_text())["data"]["source"]["type"] == "table"
    rows = list(csv.DictReader(io.StringIO(Path("film.csv").read_text())))
    assert [(row["url"], row["start"], row["end"], row["split"]) for row in rows] == [
        (str(tmp_path / "film.mp4"), "", "8.0", "train"),
        (str(tmp_path / "film.mp4"), "8.0", "", "val"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no video; name another folder"),
        ({"a.txt": b"text", "b.pdf": b"%PDF"}, r"holds no video; it holds 1 \.pdf, 1 \.txt"),
        ({"a.mp4": b"nothing", "b.mkv": b""}, r"none of 2 videos chosen from .* can be read "),
    ],
)
def test_a_folder_without_videos_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, files, message):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        CliRunner().invoke(app, ["init", str(folder)], catch_exceptions=False)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_this_machine_is_one_that_can_train():
    machine = choices_module.this_machine()
    assert machine.num_cpus >= 1
    assert str(machine)
