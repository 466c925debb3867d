"""Processes of the stage are killed at random moments; running it again is the recovery."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from clipmill.config import RunConfig
from clipmill.shards.verify import verify
from tests.pipeline.corpus import files_of, members_of, run_config
from tests.pipeline.poison import Film, write_film
from tests.pipeline.processes import REPOSITORY, Job

pytestmark = pytest.mark.slow

NUM_VIDEOS = 36
RUN_SECONDS = 300
"""More than any run takes: one that is still there then hangs."""

KINDS: dict[str, Callable[[str], bool]] = {
    "worker": lambda command: "ray::FanoutActor" in command,
    "decoder child": lambda command: "clipmill.video.worker" in command,
    "raylet": lambda command: command.split(" ")[0].endswith("/raylet"),
}
"""Processes beside the driver that are killed, by their command lines."""


@dataclass
class Undisturbed:
    """A source of good films, and its data set by a run that nobody killed."""

    source: Path
    files: dict[str, bytes] = field(default_factory=dict)

    def config(self, root: Path) -> RunConfig:
        config = run_config(
            root, self.source, num_workers=2, clip={"num_frames": 4, "resolution": 64}, unit_bytes=20_000
        )
        # Each kill costs a unit an attempt.
        return config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_failures": 3})})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "source").mkdir()
    for number in range(NUM_VIDEOS):
        _write_numbered(folder / "source", number)
    found = Undisturbed(folder / "source")
    with Job(found.config(folder / "run")) as job:
        assert job.wait(RUN_SECONDS) == 0, job.output
        assert job.leaked(patience_seconds=20) == []
    found.files = dataset(folder / "run")
    assert sum(name.endswith(".tar") for name in found.files) >= 8
    return found


def _write_numbered(source: Path, number: int) -> None:
    film = Film("mp4", "libx264", size=(160, 120), num_frames=60 + number)
    write_film(source / f"{number:03d}.mp4", film, seed=number)


def dataset(root: Path) -> dict[str, bytes]:
    """What readers and later runs rely on.

    That is neither the lease, nor the times of a summary, nor the places of root and source, nor the tally, whose
    segments end where a run did.
    """
    files = files_of(root / "clips", but=("summary.json", "config.yaml", "tally"))
    return {name: re.sub(rb'"base_url": "[^"]*"', b"", data) for name, data in files.items()}


@pytest.mark.parametrize(("num_kills", "seed"), [pytest.param(4, 1, marks=pytest.mark.ci), (25, 2)])
def test_whatever_is_killed_running_again_ends_in_the_same_bytes(
    undisturbed: Undisturbed, tmp_path: Path, num_kills: int, seed: int
) -> None:
    rng = random.Random(seed)
    # All kinds equally often, in random order.
    plan = [kind for _ in range(-(-num_kills // 4)) for kind in rng.sample(["driver", *KINDS], 4)][:num_kills]
    kills: list[str] = []
    rounds = 0
    while len(kills) < num_kills:
        root = tmp_path / f"run-{rounds}"
        rounds += 1
        status = -1
        while status != 0:
            with Job(undisturbed.config(root)) as job:
                status = _run_among_killers(job, rng, plan[len(kills) :], kills)
                assert status in (0, 1, -signal.SIGKILL), job.output
                # Ray's agents notice late that their raylet was killed where the machine is busy.
                assert job.leaked(patience_seconds=180) == [], job.output
        _check(undisturbed, root)
    print(f"{num_kills} kills in {rounds} rounds: {kills}")


def _run_among_killers(job: Job, rng: random.Random, plan: list[str], kills: list[str]) -> int:
    """Waits for the end of a run, killing one process after the other.

    Args:
        job: the run.
        rng: chooses the moments, and one of several processes of a kind.
        plan: the kinds to kill, in order.
        kills: grows by the kinds that were killed.
    """
    deadline = time.monotonic() + RUN_SECONDS
    for kind in plan:
        sight = rng.choice(list(KINDS)) if kind == "driver" else kind  # when the run has come so far that ...
        while not _of_kind(job, sight):
            assert time.monotonic() < deadline, f"hangs:\n{job.output}"
            if (status := _status(job, 0.1)) is not None:
                return status
        if (status := _status(job, rng.uniform(0.0, 3.0))) is not None:
            return status
        victims = [job.driver] if kind == "driver" else _of_kind(job, kind)
        if not victims:
            return job.wait(RUN_SECONDS)
        rng.choice(victims).kill()
        kills.append(kind)
    return job.wait(RUN_SECONDS)


def _status(job: Job, timeout_seconds: float) -> int | None:
    """Its exit status if it ends within so long."""
    try:
        return job.wait(timeout_seconds)
    except psutil.TimeoutExpired:
        return None


def _of_kind(job: Job, kind: str) -> list[psutil.Process]:
    found = []
    for process in job.processes():
        try:
            if KINDS[kind](" ".join(process.cmdline())):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


def _check(undisturbed: Undisturbed, root: Path) -> None:
    """The data set is the undisturbed one to the byte; what else lies there is named by verify and can be removed."""
    found = dataset(root)
    assert "quarantine.jsonl" not in found
    assert {name: found.get(name) for name in undisturbed.files} == undisturbed.files
    left_over = found.keys() - undisturbed.files.keys()
    named = set()
    for split in ("train", "val"):
        report = verify(str(root / "clips" / split), deep=False)
        assert report.problems == []
        named |= {f"{split}/{name}" for name in report.orphans}
    assert named == left_over
    pruned = subprocess.run(
        [sys.executable, "-m", "clipmill.cli", "verify", str(root), "--prune", "--grace-seconds", "0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert pruned.stdout.count("orphan removed") == len(left_over), pruned.stdout
    assert dataset(root) == undisturbed.files


@pytest.mark.ci
def test_an_extension_killed_on_its_way_loses_and_doubles_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(undisturbed.source, source)
    config = Undisturbed(source).config(tmp_path / "run")
    clips = tmp_path / "run" / "clips"
    _finish(config)
    older = dataset(tmp_path / "run")
    assert older == undisturbed.files
    for number in range(NUM_VIDEOS, NUM_VIDEOS + NUM_VIDEOS // 5):
        _write_numbered(source, number)
    num_commits = len(list(clips.glob("*/commits/*.json")))
    with Job(config, "--extend") as job:
        while len(list(clips.glob("*/commits/*.json"))) == num_commits:
            assert job.driver.is_running(), job.output
            time.sleep(0.02)
        job.driver.kill()
        assert job.leaked(patience_seconds=60) == []
    _finish(config, "--extend")
    extended = dataset(tmp_path / "run")
    immutable = {name for name in older if name.endswith((".tar", ".idx", ".parquet")) or "/commits/" in name}
    assert immutable
    assert {name: extended[name] for name in immutable} == {name: older[name] for name in immutable}
    at_once = Undisturbed(source).config(tmp_path / "at-once")
    _finish(at_once)
    assert members_of(config) == members_of(at_once)
    _finish(config, "--extend")  # nothing came since
    assert dataset(tmp_path / "run") == extended


def _finish(config: RunConfig, *options: str) -> None:
    with Job(config, *options) as job:
        assert job.wait(RUN_SECONDS) == 0, job.output


@pytest.mark.ci
def test_lost_shards_of_a_killed_run_are_repaired_to_the_byte(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = undisturbed.config(tmp_path / "run")
    with Job(config) as job:
        while not list((tmp_path / "run" / "clips").glob("*/commits/*.json")):
            assert job.driver.is_running(), job.output
            time.sleep(0.02)
        job.driver.kill()
        assert job.leaked(patience_seconds=60) == []
    _finish(config)
    for path in random.Random(3).sample(sorted((tmp_path / "run" / "clips").glob("*/*.tar")), 3):
        path.unlink()
    repaired = subprocess.run(
        [sys.executable, "-m", "clipmill.cli", "verify", str(tmp_path / "run"), "--repair"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert dataset(tmp_path / "run").items() >= undisturbed.files.items()


@pytest.mark.ci
def test_of_two_runs_on_one_root_one_is_refused(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = undisturbed.config(tmp_path / "run")
    with Job(config) as first, Job(config) as second:
        statuses = sorted((first.wait(RUN_SECONDS), second.wait(RUN_SECONDS)))
        outputs = first.output + second.output
    assert statuses == [0, 2], outputs
    assert "is in use by shard" in outputs
    assert dataset(tmp_path / "run") == undisturbed.files


def test_a_run_that_lost_its_lease_commits_nothing_more(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = undisturbed.config(tmp_path / "run")
    clips = tmp_path / "run" / "clips"
    with Job(config) as first:
        while not list(clips.glob("*/commits/*.json")):
            assert first.driver.is_running()
            time.sleep(0.05)
        first.driver.suspend()  # a driver that has gone silent while its workers go on
        claim = max((clips / "_lease").iterdir())
        document = json.loads(claim.read_text())
        claim.write_text(json.dumps({**document, "pid": 2**22 + 1}))  # taken for dead
        with Job(config) as second:
            assert second.wait(RUN_SECONDS) == 0, second.output
        assert dataset(tmp_path / "run").items() >= undisturbed.files.items()
        first.driver.resume()
        assert first.wait(RUN_SECONDS) in (0, 1), first.output
    assert dataset(tmp_path / "run").items() >= undisturbed.files.items()
