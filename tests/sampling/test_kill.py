"""Processes of the stage are killed at random moments; running it again ends in the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from clipmill.config import RunConfig
from clipmill.shards.verify import verify
from tests.evaluation.toy_run import make_samples, toy_config, write_run
from tests.pipeline.corpus import files_of
from tests.pipeline.processes import Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

KINDS = {"worker": "ray::FanoutActor", "raylet": "/raylet"}
"""Processes beside the driver, by what their command lines hold."""
RUN_SECONDS = 400


def config_of(root: Path) -> RunConfig:
    """Twenty units; each draws many windows a sample, so that a kill finds it at work."""
    config = toy_config(root, num_samples=59, batch_size=3)
    sample = config.sample.model_copy(update={"num_frames": 128})
    cluster = config.cluster.model_copy(update={"max_failures": 20})
    return config.model_copy(update={"sample": sample, "cluster": cluster})


def dataset(root: Path) -> dict[str, bytes]:
    """What readers rely on, and the preview: all but the lease, and the times and places of a summary."""
    return files_of(root / "samples" / "default", but=("_lease", "summary.json", "config.yaml"))


def test_fifteen_kills_leave_the_same_bytes(tmp_path: Path):
    write_run(toy_config(tmp_path / "undisturbed"), tmp_path / "scratch")
    for root in ("expected", "run"):
        shutil.copytree(tmp_path / "undisturbed" / "prior", tmp_path / root / "prior")
    make_samples(config_of(tmp_path / "expected"))
    expected = dataset(tmp_path / "expected")
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
        found = dataset(tmp_path / "run")
        assert {name: found.get(name) for name in expected} == expected
        report = verify(str(tmp_path / "run" / "samples" / "default"), deep=True)
        assert report.problems == []
        assert found.keys() - expected.keys() == set(report.orphans)
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
