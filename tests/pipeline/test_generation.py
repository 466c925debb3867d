from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clipmill import stages
from clipmill.config import RunConfig
from clipmill.pipeline import shard
from clipmill.pipeline.inspect import inspect
from clipmill.pipeline.plan import Plan, load_plan
from clipmill.pipeline.planning import generation
from clipmill.pipeline.sources.record import EDGE_BYTES
from clipmill.shards.commits import committed_units
from clipmill.shards.manifest import SPLITS, Manifest
from clipmill.shards.verify import verify
from tests.pipeline.corpus import (
    CLASSES,
    extend_plan,
    files_of,
    make_plan,
    num_clips_of,
    run_config,
    video_bytes,
    write_corpus,
)

REPOSITORY = Path(__file__).parents[2]


def write_videos(source: Path, numbers: range) -> None:
    for number in numbers:
        path = source / CLASSES[number % 4] / f"{number:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video_bytes(number, 9 + 2 * (number % 5)))


def objects(config: RunConfig) -> dict[str, bytes]:
    """What may never change: shards, indexes, commit records."""
    folder = Path(config.folder("clips"))
    return {
        name: content
        for name, content in files_of(folder).items()
        if name.endswith((".tar", ".idx")) or "/commits/" in name or name.endswith(".parquet")
    }


def urls(plan: Plan) -> list[str]:
    return sorted(
        video.url
        for split in SPLITS
        for number in range(plan.num_units(split))
        for video in plan.unit(split, number).videos
    )


def ids_of(plan: Plan) -> set[str]:
    return {one for table in plan.tables(["id"]) for one in table["id"].to_pylist()}


def num_clips(config: RunConfig) -> int:
    return sum(Manifest.load(config.folder("clips", split), "clips").num_samples for split in SPLITS)


def test_an_extension_adds_what_is_new_and_leaves_the_rest(
    embedded: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    write_videos(source, range(10))
    config = run_config(tmp_path / "run", source)
    stages.run_stage("shard", config)
    before, fingerprint = objects(config), Manifest.load(config.folder("clips", "train")).fingerprint
    write_videos(source, range(10, 12))
    shutil.copy(source / CLASSES[0] / "000.mp4", source / "again.mp4")
    assert stages.run_stage("shard", config) is None  # new videos alone are no reason to do anything
    summary = stages.run_stage("shard", config, "listed")
    assert summary is not None
    assert (summary["videos"], summary["duplicates"]) == (12, 1)
    assert summary["clips"] == num_clips(config) == sum(num_clips_of(seed) for seed in range(12))
    after = objects(config)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert Manifest.load(config.folder("clips", "train")).fingerprint != fingerprint
    for split in SPLITS:
        report = verify(config.folder("clips", split), deep=True)
        assert (report.problems, report.orphans) == ([], [])
    caplog.set_level(logging.INFO)
    assert stages.run_stage("shard", config, "listed") is None
    assert "the source holds no video that is not planned yet" in caplog.text
    assert objects(config) == after


def test_quarantined_videos_are_tried_again_in_a_generation_of_their_own(embedded: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_corpus(source, videos_per_class=1)
    config = run_config(tmp_path / "run", source)
    first = stages.run_stage("shard", config)
    before = objects(config)
    again = stages.run_stage("shard", config, "retried")
    assert first is not None
    assert again is not None
    assert (first["failed"], first["videos"]) == (again["failed"], again["videos"]) == (2, 7)
    assert load_plan(config).generations[1]["videos"] == 2
    after = objects(config)
    assert {name: after[name] for name in before} == before
    lines = (Path(config.folder("clips")) / "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["url"] for line in lines} == {"up/broken.mp4", "up/readme.mp4"}
    assert sum(len(inspect(config.folder("clips", split))["excluded"]) for split in SPLITS) == 2


def test_a_video_that_came_back_leaves_the_quarantine(embedded: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_videos(source, range(6))
    config = run_config(tmp_path / "run", source)
    make_plan(config)
    hidden = source / CLASSES[1] / "001.mp4"
    hidden.rename(tmp_path / "hidden.mp4")
    first = stages.run_stage("shard", config)
    (tmp_path / "hidden.mp4").rename(hidden)
    again = stages.run_stage("shard", config, "retried")
    assert first is not None
    assert again is not None
    assert (first["failed"], again["failed"], again["videos"]) == (1, 0, 6)
    assert again["clips"] == num_clips(config) == sum(num_clips_of(seed) for seed in range(6))
    assert (Path(config.folder("clips")) / "quarantine.jsonl").read_bytes() == b""
    assert stages.run_stage("shard", config, "retried") is None


def test_a_planner_that_was_killed_leaves_the_plan_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_videos(tmp_path / "source", range(6))
    config = run_config(tmp_path / "run", tmp_path / "source")
    make_plan(config)
    write_videos(tmp_path / "source", range(6, 9))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation, "create_generation", die)
        with pytest.raises(KeyboardInterrupt):
            extend_plan(config)
    assert load_plan(config).num_videos == 6
    assert extend_plan(config)
    assert not extend_plan(config)
    plan = load_plan(config)
    assert len(set(urls(plan))) == len(urls(plan)) == plan.num_videos == 9


def test_look_alikes_of_planned_videos_are_told_from_them(tmp_path: Path) -> None:
    edge, source = bytes(EDGE_BYTES), tmp_path / "source"
    source.mkdir()
    (source / "b.mp4").write_bytes(edge + b"elder" + edge)
    config = run_config(tmp_path / "run", source)
    elder = make_plan(config)
    (source / "a.mp4").write_bytes(edge + b"other" + edge)
    (source / "c.mp4").write_bytes(edge + b"elder" + edge)
    assert extend_plan(config)
    plan = load_plan(config)
    assert urls(plan) == ["a.mp4", "b.mp4"]
    assert plan.num_duplicates == 1
    assert ids_of(elder) <= ids_of(plan)
    (source / "b.mp4").unlink()  # the other look-alikes still are who they were
    (source / "c.mp4").unlink()
    assert not extend_plan(config)


def test_the_same_command_goes_on_after_a_kill(embedded: None, tmp_path: Path) -> None:
    """SIGKILL of a whole extension, driver first, at some moment; then the same command again."""
    source = tmp_path / "source"
    write_videos(source, range(8))
    config = run_config(tmp_path / "run", source)
    stages.run_stage("shard", config)
    shutil.copytree(tmp_path / "run", tmp_path / "undisturbed")
    write_videos(source, range(8, 16))
    undisturbed = run_config(tmp_path / "undisturbed", source)
    stages.run_stage("shard", undisturbed, "listed")
    command = (
        "import sys; from clipmill import stages; from clipmill.config import RunConfig; "
        "stages.run_stage('shard', RunConfig.model_validate_json(sys.argv[1]), 'listed')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", command, config.model_dump_json()],
        cwd=REPOSITORY,
        env=environment,
        start_new_session=True,
    )
    train = config.folder("clips", "train")
    num_committed = len(committed_units(train))
    deadline = time.monotonic() + 120
    while len(committed_units(train)) == num_committed and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not shard.is_finished(config)
    stages.run_stage("shard", config, "listed")
    left, wanted = objects(config), objects(undisturbed)  # the kill may leave orphans beside
    assert {name: left.get(name) for name in wanted} == wanted
    for split in SPLITS:
        assert (
            Manifest.load(config.folder("clips", split)).fingerprint
            == Manifest.load(undisturbed.folder("clips", split)).fingerprint
        )
    assert num_clips(config) == sum(num_clips_of(seed) for seed in range(16))
