"""A planner that was killed while it listed is gone on with by the next one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import StageFailed, UserError
from clipmill.lease import hold
from clipmill.pipeline import shard
from clipmill.pipeline.planning import listing, make_plan, progress, spool, units
from tests.pipeline import corpus
from tests.pipeline.corpus import extend_plan, run_config
from tests.storage.s3_server import Fabricated, S3Server

REPOSITORY = Path(__file__).parents[2]
NUM_OBJECTS = 5000

PLANNER = """
import sys
from clipmill.config import RunConfig
from clipmill.pipeline.planning import progress
from tests.pipeline.corpus import make_plan
progress.PUBLISH_SECONDS = 0.05
make_plan(RunConfig.model_validate_json(sys.argv[1]))
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    server.fabricated["many"] = Fabricated(NUM_OBJECTS)
    server.use(monkeypatch)
    yield server
    server.stop()


def config_for(root: Path) -> RunConfig:
    return run_config(root, Path("x"), source={"url": "s3://many/raw"}, unit_bytes=2**28)


def parts(config: RunConfig) -> list[Path]:
    return sorted(Path(config.folder("clips", "plan", "listing")).glob("*.json"))


def test_planning_resumes_after_a_kill_in_the_middle_of_the_listing(tmp_path: Path, bucket: S3Server) -> None:
    undisturbed = corpus.make_plan(config_for(tmp_path / "undisturbed"))
    assert bucket.num_lists() == NUM_OBJECTS // 1000
    config = config_for(tmp_path / "run")
    bucket.delay_seconds = 0.5
    planner = subprocess.Popen([sys.executable, "-c", PLANNER, config.model_dump_json()], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while len(parts(config)) < 2 and planner.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(planner.pid, signal.SIGKILL)
    planner.wait()
    num_listed = 1000 * (len(parts(config)) - 1)
    assert num_listed > 0
    bucket.delay_seconds = 0.0
    bucket.requests.clear()
    plan = corpus.make_plan(config)
    assert bucket.num_lists() <= (NUM_OBJECTS - num_listed) // 1000 + 1
    assert plan.generations == undisturbed.generations
    assert not parts(config)


def test_a_small_source_publishes_nothing_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Progress, "publish", lambda *_: pytest.fail("it takes no time to list"))
    (tmp_path / "source").mkdir()
    for number in range(20):
        (tmp_path / "source" / f"{number}.mp4").write_bytes(bytes([number]))
    config = run_config(tmp_path / "run", tmp_path / "source")
    corpus.make_plan(config)
    names = {path.name.split("-")[0] for path in Path(config.folder("clips")).rglob("*") if path.is_file()}
    assert names == {"gen", "000001.json"}


def test_a_listing_resumes_behind_every_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars, several videos of one stem, other files, and names that sort between a folder and its files."""
    monkeypatch.setattr(progress, "PUBLISH_SECONDS", 0.0)
    source = tmp_path / "source"
    names = ["a.mp4", "a.txt", "a.mkv", "a-b.mp4", "a/x.mp4", "a/x.json", "b.dat2", "c.mp4", "c.2.mp4", "c.txt", "d.md"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() * 3)
    assert resumed_everywhere(tmp_path, run_config(tmp_path / "run", source)) > 2


def test_a_table_resumes_behind_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PUBLISH_SECONDS", 0.0)
    monkeypatch.setattr("clipmill.pipeline.sources.table._ROWS_AT_ONCE", 3)
    lines = ["url,text"]
    for number in range(10):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]))
        lines += [f"{number}.mp4,t", f"gone{number}.mp4,t"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    source = {"type": "table", "url": str(table), "columns": {"text": "text"}}
    assert resumed_everywhere(tmp_path, run_config(tmp_path / "run", table, source=source)) > 4


def lose_rows(document: Path) -> None:
    document.with_suffix(".parquet").unlink()


def name_rows_elsewhere(document: Path) -> None:
    document.with_suffix(".parquet").unlink()
    document.write_text(json.dumps(json.loads(document.read_text()) | {"file": "../../../../stolen.parquet"}))


def lose_form(document: Path) -> None:
    document.write_text(json.dumps({"schema": 1, "after": [], "videos": "many"}))


@pytest.mark.parametrize("damage", [lose_rows, name_rows_elsewhere, lose_form])
def test_a_part_that_is_not_whole_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    config = killed_in_its_listing(tmp_path, monkeypatch)
    damage(parts(config)[-1])
    assert corpus.make_plan(config).num_videos == 4


def test_damaged_rows_of_a_part_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = killed_in_its_listing(tmp_path, monkeypatch)
    rows = parts(config)[-1].with_suffix(".parquet")
    rows.write_bytes(rows.read_bytes()[:-9] + bytes(9))
    with pytest.raises(UserError, match=r"parquet is damaged; remove .*/listing and run"):
        corpus.make_plan(config)


def killed_in_its_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """With two parts of four videos."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.mp4").write_bytes(bytes([number]))
    config = run_config(tmp_path / "run", source)
    real = progress.Progress.publish

    def publish_and_die(self, *arguments) -> None:
        real(self, *arguments)
        if len(parts(config)) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress, "PUBLISH_SECONDS", 0.0)
        patch.setattr(progress.Progress, "publish", publish_and_die)
        with pytest.raises(KeyboardInterrupt):
            corpus.make_plan(config)
    return config


def resumed_everywhere(tmp_path: Path, config: RunConfig) -> int:
    """Kills the planner behind each part and plans again, to the same plan; the number of parts."""
    expected = corpus.make_plan(config.model_copy(update={"root": str(tmp_path / "expected")})).generations
    real = progress.Progress.publish
    for number in range(100):
        shutil.rmtree(config.folder("clips"), ignore_errors=True)
        seen = 0

        def publish_and_die(self, *arguments, last=number) -> None:
            nonlocal seen
            real(self, *arguments)
            seen += 1
            if seen == last + 1:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(progress.Progress, "publish", publish_and_die)
            try:
                corpus.make_plan(config)
            except KeyboardInterrupt:
                pass
            else:
                return number
        assert corpus.make_plan(config).generations == expected
    raise AssertionError("the listing has no end")


def test_parts_of_another_source_are_no_parts_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PUBLISH_SECONDS", 0.0)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for number in range(4):
            (tmp_path / folder / f"{number}.mp4").write_bytes(f"{folder}{number}".encode())

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(units.Draft, "add", die)
        with pytest.raises(KeyboardInterrupt):
            corpus.make_plan(run_config(tmp_path / "run", tmp_path / "one"))
    config = run_config(tmp_path / "run", tmp_path / "two")
    assert parts(config)
    assert corpus.make_plan(config).num_videos == 4
    assert not extend_plan(config)
    assert not parts(config)


def test_a_stale_planner_publishes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PUBLISH_SECONDS", 0.0)
    (tmp_path / "source").mkdir()
    for number in range(4):
        (tmp_path / "source" / f"{number}.mp4").write_bytes(bytes([number]))
    config = run_config(tmp_path / "run", tmp_path / "source")
    with hold(shard.folder_url(config), "shard") as stale:
        pass
    with hold(shard.folder_url(config), "shard"), pytest.raises(StageFailed, match="taken over by attempt 2"):
        make_plan(config, stale)
    assert not Path(config.folder("clips", "plan")).exists()


def test_the_planner_streams_a_bucket(tmp_path: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs, ranges and batches make the same plan; a page is one request, a failed one is asked for again."""
    expected = corpus.make_plan(config_for(tmp_path / "expected"))
    monkeypatch.setattr(spool, "RUN_ROWS", 400)
    monkeypatch.setattr(listing, "BATCH_ROWS", 150)
    monkeypatch.setattr(units, "_GROUP_ROWS", 500)
    bucket.requests.clear()
    bucket.fault = lambda request, number: (503, "SlowDown") if request == "LIST" and number < 2 else None
    plan = corpus.make_plan(config_for(tmp_path / "run"))
    assert bucket.num_lists() == NUM_OBJECTS // 1000 + 2
    ids = [[one for table in each.tables(["id"]) for one in table["id"].to_pylist()] for each in (expected, plan)]
    assert ids[0] == ids[1]
    assert sum(1 for _ in plan.tables()) > 4
    for split in ("train", "val"):
        assert plan.num_units(split) == expected.num_units(split)
        for number in range(plan.num_units(split)):
            assert plan.unit(split, number) == expected.unit(split, number)
    assert storage.exists(config_for(tmp_path / "run").folder("clips", "plan", "gen-0000.json"))
