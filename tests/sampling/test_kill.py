"""Processes of the stage are killed at random moments; running it again ends in the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from clipmill.config import RunConfig
from clipmill.shards.verify import verify
from tests.evaluation.toy_run import make_samples, toy_config, write_run
from tests.pipeline.corpus import files_of
from tests.pipeline.processes import REPOSITORY, Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KINDS = {"worker": "ray::FanoutActor", "raylet": "/raylet"}
"""Processes beside the driver, by what their command lines hold."""
RUN_SECONDS = 900


def config_of(root: Path) -> RunConfig:
    """Ten units; each draws many windows a sample, so that a kill finds it at work."""
    config = toy_config(root, num_samples=59, batch_size=3)
    sample = config.sample.model_copy(update={"num_frames": 128})
    cluster = config.cluster.model_copy(update={"max_failures": 20})
    return config.model_copy(update={"sample": sample, "cluster": cluster})


def dataset(root: Path) -> dict[str, bytes]:
    """What readers rely on, and the preview: all but the lease, and the times and places of a summary."""
    return files_of(root / "samples" / "default", but=("summary.json", "config.yaml"))


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The undisturbed set; ``tmp_path/run`` holds the same prior and nothing else."""
    write_run(toy_config(tmp_path / "undisturbed"), tmp_path / "scratch")
    for root in ("expected", "run"):
        shutil.copytree(tmp_path / "undisturbed" / "prior", tmp_path / root / "prior")
    make_samples(config_of(tmp_path / "expected"))
    return dataset(tmp_path / "expected")


def check(root: Path, expected: dict[str, bytes]) -> None:
    """The set is the undisturbed one to the byte; what else lies there is named by verify."""
    found = dataset(root)
    assert {name: found.get(name) for name in expected} == expected
    report = verify(str(root / "samples" / "default"), deep=True)
    assert report.problems == []
    assert found.keys() - expected.keys() == set(report.orphans)


@pytest.mark.ci
def test_a_process_killed_fifteen_times_leaves_the_same_bytes(expected: dict[str, bytes], tmp_path: Path):
    """Without Ray: the stage in one process, killed while it draws, publishes, commits, freezes or previews."""
    program = (
        "import sys; from pathlib import Path; from tests.sampling.test_kill import config_of; "
        "from tests.evaluation.toy_run import make_samples; print('ready', flush=True); "
        "make_samples(config_of(Path(sys.argv[1])))"
    )
    rng, rounds = random.Random(7), 0
    committed: list[int] = []  # units at each kill
    while len(committed) < 15:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "run")], cwd=REPOSITORY, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                assert process.wait(rng.uniform(0.0, 6.0)) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                committed.append(len(list((tmp_path / "run" / "samples" / "default" / "commits").glob("*.json"))))
                continue
        check(tmp_path / "run", expected)
        rounds += 1
        shutil.rmtree(tmp_path / "run" / "samples")
    print(f"kills with {committed} units committed, {rounds} finished sets between them")
    assert max(committed) > 0
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], cwd=REPOSITORY, check=True)
    check(tmp_path / "run", expected)


def test_fifteen_kills_on_ray_leave_the_same_bytes(expected: dict[str, bytes], tmp_path: Path):
    rng = random.Random(13)
    plan = rng.sample(["driver"] * 5 + ["worker"] * 7 + ["raylet"] * 3, 15)
    kills: list[str] = []
    rounds = 0
    while len(kills) < 15:
        shutil.rmtree(tmp_path / "run" / "samples", ignore_errors=True)
        rounds += 1
        status = -1
        while status != 0:
            with Job(config_of(tmp_path / "run"), stage="sample") as job:
                status = among_killers(job, rng, plan[len(kills) :], kills)
                assert status in (0, 1, -signal.SIGKILL), job.output[-2000:]
                assert job.leaked(patience_seconds=90) == []
        check(tmp_path / "run", expected)
    print(f"{len(kills)} kills in {rounds} rounds: {kills}")


def among_killers(job: Job, rng: random.Random, plan: list[str], kills: list[str]) -> int:
    """Waits for the end of a run, killing one process after the other; ``kills`` grows by the kinds."""
    deadline = time.monotonic() + RUN_SECONDS
    for kind in plan:
        while not (victims := of_kind(job, "worker" if kind == "driver" else kind)):
            assert time.monotonic() < deadline, f"hangs:\n{job.output[-2000:]}"
            if (status := status_of(job, 0.1)) is not None:
                return status
        if (status := status_of(job, rng.uniform(0.0, 4.0))) is not None:
            return status
        if kind == "driver":
            victims = [job.driver]
        for victim in [each for each in [rng.choice(victims)] if each.is_running()]:
            victim.kill()
            kills.append(kind)
    return job.wait(RUN_SECONDS)


def status_of(job: Job, timeout_seconds: float) -> int | None:
    """Exit status of the driver if it ends within so long."""
    try:
        return job.wait(timeout_seconds)
    except psutil.TimeoutExpired:
        return None


def of_kind(job: Job, kind: str) -> list[psutil.Process]:
    """Processes of the job, by process id."""
    found = []
    for process in job.processes():
        try:
            if KINDS[kind] in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)
