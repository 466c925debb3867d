"""What a data set has lost is made again from the raw videos, byte for byte, or the run says why it cannot be."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clipmill import stages
from clipmill.config import RunConfig
from clipmill.errors import StageFailed
from clipmill.pipeline import shard
from clipmill.shards.verify import verify
from clipmill.stages import run_stage
from tests.pipeline.corpus import files_of, run_config, write_corpus


@pytest.fixture(scope="module")
def whole(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder / "source")
    config = run_config(folder / "run", folder / "source", num_workers=2, max_failed_share=1.0)
    run_stage("shard", config)
    return config


@pytest.fixture
def run(whole: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of the finished run, in another place and over a copy of its videos."""
    shutil.copytree(whole.root, tmp_path / "run")
    shutil.copytree(whole.data.source.url, tmp_path / "source")
    source = whole.data.source.model_copy(update={"url": str(tmp_path / "source")})
    data = whole.data.model_copy(update={"source": source})
    return whole.model_copy(update={"root": str(tmp_path / "run"), "data": data})


def dataset(config: RunConfig) -> dict[str, bytes]:
    return files_of(Path(config.folder("clips")), but=("summary.json", "config.yaml", "tally"))


def repair(config: RunConfig) -> None:
    """As ``clipmill verify --repair`` with the run's config."""
    reports = {url: verify(url, deep=False) for url in stages.find_datasets(config.root)}
    damaged = {url: report.damaged_units for url, report in reports.items() if report.needs_repair}
    stages.repair(config.root, damaged, config)


def tars(config: RunConfig) -> list[Path]:
    return sorted(Path(config.folder("clips")).glob("*/*.tar"))


def test_lost_shards_come_back_by_running_the_stage_again(run: RunConfig) -> None:
    before = dataset(run)
    for path in random.Random(0).sample(tars(run), 3):
        path.unlink()
    tars(run)[0].with_name(tars(run)[0].name + ".idx").unlink()
    assert not shard.is_finished(run)
    assert run_stage("shard", run) is not None
    assert dataset(run) == before
    assert run_stage("shard", run) is None


def test_damage_of_every_kind_is_repaired(run: RunConfig) -> None:
    before = dataset(run)
    flipped, cut, unrecorded, garbled = tars(run)[:4]
    content = bytearray(flipped.read_bytes())
    content[600] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:1024])
    record_of(unrecorded).unlink()
    record_of(garbled).write_text('{"schema": 2, "un')
    repair(run)
    assert dataset(run) == before
    assert all(verify(url, deep=True).problems == [] for url in stages.find_datasets(run.root))
    assert shard.is_finished(run)


@pytest.mark.parametrize("by", [repair, lambda config: run_stage("shard", config)], ids=["verify", "shard"])
def test_a_damaged_manifest_is_made_again(run: RunConfig, by: Callable[[RunConfig], object]) -> None:
    before = dataset(run)
    cut, flipped = (Path(run.folder("clips", split, "manifest.json")) for split in ("train", "val"))
    cut.write_bytes(cut.read_bytes()[:100])
    flipped.write_text(flipped.read_text().replace('"num_videos": ', '"num_videos": -'))
    by(run)
    assert dataset(run) == before


@pytest.mark.parametrize("name", ["shards.txt", "wids.json"])
def test_a_lost_list_of_shards_is_made_again(run: RunConfig, name: str) -> None:
    before = dataset(run)
    Path(run.folder("clips", "train", name)).unlink()
    Path(run.folder("clips", "val", name)).write_text("other.tar\n")
    repair(run)
    assert dataset(run) == before


def record_of(tar: Path) -> Path:
    return tar.parent / "commits" / f"{tar.name.split('-')[1]}.json"


def test_a_garbled_record_of_an_unfinished_data_set_is_repaired(run: RunConfig) -> None:
    before = dataset(run)
    for split in ("train", "val"):
        Path(run.folder("clips", split, "manifest.json")).unlink()
    record_of(tars(run)[0]).write_text("{}")
    repair(run)
    assert dataset(run) == before


def test_what_has_changed_is_named_and_nothing_is_written(run: RunConfig) -> None:
    lost, other = tars(run)[:2]
    record = json.loads(record_of(lost).read_text())
    (video, *_) = [video["url"] for video in record["videos"] if video["clips"]]
    (Path(run.data.source.url) / video).unlink()
    lost.unlink()
    content = other.read_bytes()
    other.unlink()
    before = dataset(run)
    with pytest.raises(StageFailed, match=f"1 of 2 damaged units .* cannot be restored: .*{video}: {video} is missing"):
        run_stage("shard", run)
    assert dataset(run) == before | {str(other.relative_to(run.folder("clips"))): content}


def test_other_versions_are_named(run: RunConfig) -> None:
    for split in ("train", "val"):  # a run that was killed before it froze
        Path(run.folder("clips", split, "manifest.json")).unlink()
    lost = tars(run)[0]
    path = record_of(lost)
    record = json.loads(path.read_text())
    record["versions"]["av"] = "0.0.1"
    record["parts"][0]["sha256"] = "0" * 64  # as that version would have written it
    path.write_text(json.dumps(record))
    lost.unlink()
    with pytest.raises(StageFailed, match=r"it was made with av 0\.0\.1, here is \d"):
        run_stage("shard", run)


def test_the_recorded_config_repairs_a_moved_run(run: RunConfig, whole: RunConfig) -> None:
    before = dataset(run)
    tars(run)[0].unlink()
    url = run.folder("clips", "train")
    stages.repair(run.root, {url: verify(url, False).damaged_units})
    assert dataset(run) == before
