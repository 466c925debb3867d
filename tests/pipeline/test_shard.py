from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import StageFailed, UserError
from clipmill.pipeline import shard
from clipmill.pipeline.inspect import inspect
from clipmill.pipeline.plan import load_plan
from clipmill.shards.manifest import Manifest
from clipmill.stages import run_stage
from tests.pipeline.corpus import CLASSES, facts_of, files_of, num_clips_of, run_config, run_shard, write_corpus

NUM_VIDEOS = 12
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A corpus with bad files, sharded without any disturbance."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "source")
    config = run_config(folder / "run", folder / "source", num_workers=2)
    return config, run_shard(config)


def manifests(config: RunConfig) -> dict[str, Manifest]:
    return {split: Manifest.load(config.folder("clips", split), "clips") for split in ("train", "val")}


def test_every_good_clip_is_there(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    num_clips = sum(num_clips_of(seed) for seed in range(NUM_VIDEOS))
    assert summary["clips"] == num_clips == sum(manifest.num_samples for manifest in manifests(config).values())
    assert summary["videos"] == NUM_VIDEOS + 3
    assert (summary["failed"], summary["short"], summary["duplicates"], summary["classes"]) == (2, 1, 0, 4)
    assert summary["clips_per_second"] > 0
    assert min(split["clips"] for split in summary["splits"].values()) > 0
    assert load_plan(config).num_units("train") > 2


def test_the_manifests_hold_what_readers_ask_for(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    for manifest in manifests(config).values():
        assert manifest.recipe["clip"]["num_frames"] == 4
        assert (manifest.recipe["format"], manifest.recipe["quality"]) == ("mp4", 16)
        assert manifest.facts["classes"] == list(CLASSES)
        assert -0.5 < manifest.facts["pixel_mean"] < 0.5
        assert 0 < manifest.facts["pixel_variance"] < 0.25


def test_webdataset_reads_the_shards(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    folder = Path(config.folder("clips", "train"))
    tars = [str(folder / name) for name in (folder / "shards.txt").read_text().split()]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(samples) == manifests(config)["train"].num_samples
    for sample in samples:
        described = json.loads(sample["json"])
        assert sample["__key__"].startswith(described["video"] + "_")
        assert described["label"] == Path(described["source"]).parent.name
        assert sample["mp4"][4:8] == b"ftyp"


def test_bad_files_are_listed_with_their_causes(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    lines = storage.read_bytes(config.folder("clips", "quarantine.jsonl")).splitlines()
    causes = {entry["url"]: entry for entry in map(json.loads, lines)}
    assert causes.keys() == {"up/broken.mp4", "up/readme.mp4"}
    assert "Invalid data" in causes["up/readme.mp4"]["cause"]
    assert causes["up/readme.mp4"]["stage"] == "decode"
    assert len(causes["up/readme.mp4"]["attempts"]) >= 2


def test_a_finished_stage_stays_as_it_is(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    assert shard.is_finished(config)
    before = files_of(Path(config.folder("clips")))
    again = run_shard(config)
    assert facts_of(again) == facts_of(summary)
    assert files_of(Path(config.folder("clips"))) == before


def test_changed_settings_are_refused(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    changed = config.model_copy(update={"data": config.data.model_copy(update={"crf": 30})})
    with pytest.raises(UserError, match=r"data\.crf \(16 -> 30\)"):
        shard.is_finished(changed)


def test_inspect_describes_a_split(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    described = inspect(config.folder("clips", "train"))
    assert described["clips"] == summary["splits"]["train"]["clips"] == sum(described["classes"].values())
    assert set(described["classes"]) <= {*CLASSES, "-"}
    assert 0 < described["video_seconds"]["min"] <= described["video_seconds"]["max"] < 2
    assert described["contact_sheet"].startswith(b"\x89PNG")
    with pytest.raises(UserError, match="holds no finished clips, tokens or samples"):
        inspect(config.folder("clips"))


@pytest.mark.parametrize("moment", [pytest.param("after the plan", marks=pytest.mark.slow), "after a commit"])
def test_after_a_kill_the_next_run_writes_the_same_bytes(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, moment: str
) -> None:
    config, summary = finished
    killed = config.model_copy(update={"root": str(tmp_path / "run")})
    (tmp_path / "config.json").write_text(killed.model_dump_json())
    program = (
        "import sys, tests.pipeline.corpus as corpus\n"
        "corpus.run_shard(corpus.RunConfig.model_validate_json(open(sys.argv[1]).read()))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "config.json")], cwd=REPOSITORY)
    clips = Path(killed.folder("clips"))
    pattern = "plan/gen-0000.json" if moment == "after the plan" else "*/commits/*.json"
    try:
        while not list(clips.glob(pattern)):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not shard.is_finished(killed)
    assert facts_of(run_shard(killed)) == facts_of(summary)
    undisturbed = files_of(Path(config.folder("clips")))
    found = files_of(clips)
    # What the killed run left unfinished is no part of the data set; everything in the data set is equal.
    assert {name: found[name] for name in undisturbed} == undisturbed


def test_the_stage_stops_when_too_many_videos_fail(embedded: None, tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1)
    config = run_config(tmp_path / "run", tmp_path / "source", max_failed_videos=1, max_failed_share=0.0)
    with pytest.raises(StageFailed, match=r"2 of the first \d+ videos failed, most often .*max_failed_videos"):
        run_shard(config)
    assert not shard.is_finished(config)
    allowed = run_config(tmp_path / "run", tmp_path / "source", max_failed_videos=2, max_failed_share=0.0)
    assert run_shard(allowed)["failed"] == 2


def test_a_source_without_a_clip_fails_with_the_counts(embedded: None, tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config = run_config(tmp_path / "run", tmp_path / "source", clip={"num_frames": 500, "resolution": 32})
    with pytest.raises(StageFailed, match=r"\d are shorter than 500 frames and 0 failed"):
        run_shard(config)


def test_an_empty_val_split_is_a_warning(embedded: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config = run_config(tmp_path / "run", tmp_path / "source", val_fraction=0.0, unit_bytes=10**9)
    with caplog.at_level(logging.WARNING):
        run_shard(config)
    assert "the split val has no clip" in caplog.text
    assert manifests(config)["val"].num_samples == 0
    assert shard.is_finished(config)


@pytest.mark.parametrize("make", [lambda source: None, lambda source: source.mkdir()])
def test_nothing_is_written_for_a_source_without_videos(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "source")
    config = run_config(tmp_path / "run", tmp_path / "source")
    with pytest.raises(UserError, match=r"data\.source\.url"):
        shard.is_finished(config)
    with pytest.raises(UserError, match=r"data\.source\.url"):
        shard.run(config, None)  # type: ignore[arg-type]  never asked for
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CLIPMILL_VIDEOS"), reason="CLIPMILL_VIDEOS names no folder of real videos")
def test_real_footage_stays_within_the_budget(embedded: None, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", Path(os.environ["CLIPMILL_VIDEOS"]), unit_bytes=2**20)
    summary = run_shard(config)
    assert summary["videos"] >= 20
    assert summary["failed"] <= 2


def test_without_decord_its_decoder_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "source", 1)
    config = run_config(tmp_path / "run", tmp_path / "source", decoder="decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="needs the package decord"):
        run_stage("shard", config)
    assert not (tmp_path / "run").exists()
