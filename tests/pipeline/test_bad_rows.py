"""A table of 2,000 rows of which every tenth is bad: each bad one is excluded for its cause, nothing else is lost."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipmill.config import RunConfig
from tests.pipeline.bad_rows import COLUMNS, NUM_FRAMES, Table, write_table
from tests.pipeline.corpus import files_of, members_of, run_config
from tests.pipeline.hostile_web import serve
from tests.pipeline.processes import Job
from tests.storage.s3_server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

NUM_ROWS, NUM_KILLS = 2000, 5
RUN_SECONDS = 900


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    folder = tmp_path_factory.mktemp("rows")
    bucket = S3Server()
    with pytest.MonkeyPatch.context() as patch, serve(folder / "web") as web:
        patch.setenv("CLIPMILL_STORAGE_RETRY_SECONDS", "2")
        bucket.use(patch)
        yield write_table(folder, web, bucket, NUM_ROWS)
    bucket.stop()


def config_of(root: Path, table: Path) -> RunConfig:
    config = run_config(
        root,
        table,
        num_workers=2,
        source={"type": "table", "url": str(table), "columns": {name: name for name in COLUMNS}},
        clip={"num_frames": NUM_FRAMES, "resolution": 32},
        unit_bytes=200_000,
        max_failed_share=0.15,
        fetch_seconds=4,
        fetch_bytes=10_000_000,
    )
    # Each kill costs a unit an attempt.
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_failures": NUM_KILLS})})


def dataset(root: Path) -> dict[str, bytes]:
    return files_of(root / "clips", but=("summary.json", "config.yaml"))


@pytest.fixture(scope="module")
def undisturbed(table: Table, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = config_of(tmp_path_factory.mktemp("undisturbed"), table.path)
    with Job(config) as job:
        assert job.wait(RUN_SECONDS) == 0, job.output
    return config


def test_each_bad_row_is_excluded_for_its_cause_and_no_other(table: Table, undisturbed: RunConfig) -> None:
    assert len(table.kinds) >= 25
    assert len(table.causes) == NUM_ROWS // 10
    lines = (Path(undisturbed.root) / "clips" / "quarantine.jsonl").read_text().splitlines()
    excluded = {entry["url"]: entry["cause"] for entry in map(json.loads, lines)}
    assert excluded.keys() == table.causes.keys()
    wrong = {name: cause for name, cause in excluded.items() if not re.search(table.causes[name], cause)}
    assert wrong == {}


def test_the_clips_of_every_good_row_are_there(table: Table, undisturbed: RunConfig, tmp_path: Path) -> None:
    clean = table.path.with_name("clean.jsonl")
    clean.write_text("\n".join(table.good))
    config = config_of(tmp_path, clean)
    with Job(config) as job:
        assert job.wait(RUN_SECONDS) == 0, job.output
    members = members_of(undisturbed)
    assert len([name for name in members if name.endswith(".json")]) == len(table.good)
    assert members == members_of(config)


def test_five_kills_change_no_byte(table: Table, undisturbed: RunConfig, tmp_path: Path) -> None:
    config = config_of(tmp_path, table.path)
    rng = random.Random(3)
    for number in range(NUM_KILLS):
        with Job(config) as job:
            num_commits = _num_commits(config)
            while number and _num_commits(config) == num_commits:  # the first kill meets the planner
                assert job.driver.poll() is None, job.output
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 6 if number == 0 else 1))
            victim = rng.choice([job.driver, *job.processes()])
            victim.kill()
            if victim.pid != job.driver.pid:  # the run notices, and goes on for a while
                time.sleep(rng.uniform(0, 2))
                job.driver.kill()
            job.wait(RUN_SECONDS)
            assert job.leaked(patience_seconds=60) == [], job.output
    with Job(config) as job:
        assert job.wait(RUN_SECONDS) == 0, job.output
    assert dataset(Path(config.root)) == dataset(Path(undisturbed.root))


def _num_commits(config: RunConfig) -> int:
    return len(list((Path(config.root) / "clips").glob("*/commits/*.json")))
