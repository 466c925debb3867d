"""SIGTERM lets running units finish for a while, and leaves no temporary file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from clipmill.cluster.connection import GIVE_UP_SECONDS, drain_seconds
from clipmill.config import ClusterConfig


class Stage:
    """A driver of two workers. Each unit takes 8 s, keeps a file in a temporary folder, and at last moves it away."""

    def __init__(self, folder: Path, seconds: int) -> None:
        self.temporary, self.finished = folder / "tmp", folder / "finished"
        self.temporary.mkdir()
        self.finished.mkdir()
        script = Path(__file__).with_name("driver.py")
        self.process = subprocess.Popen(
            [sys.executable, script, "scratch", self.finished, str(seconds)],
            env={**os.environ, "TMPDIR": str(self.temporary), "RAY_TMPDIR": "/tmp"},  # paths of sockets are short
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def files(self) -> list[Path]:
        """Of units that run."""
        return list(self.temporary.glob("clipmill-*/video"))

    def wait_for(self, count: int) -> None:
        """Until so many units run."""
        deadline = time.monotonic() + 120
        while len(self.files()) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def end(self) -> tuple[int, str, float]:
        """SIGTERM; (exit status, output, seconds until the end)."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output, time.monotonic() - began


@pytest.fixture
def stages() -> Iterator[list[Stage]]:
    started: list[Stage] = []
    yield started
    for stage in started:
        if stage.process.poll() is None:
            for process in [*psutil.Process(stage.process.pid).children(recursive=True), stage.process]:
                process.kill()
            stage.process.wait()


def test_units_finish_within_the_grace_period(tmp_path: Path, stages: list[Stage]) -> None:
    stages.append(stage := Stage(tmp_path, seconds=60))
    stage.wait_for(2)
    status, output, _ = stage.end()
    assert status == 75
    assert "stopping: units that run get 60 s to finish" in output
    assert "Interrupted stopped with 98 of 100 units to do" in output  # those queued behind them were not begun
    assert len(list(stage.finished.iterdir())) == 2
    assert list(stage.temporary.glob("clipmill-*")) == []


def test_units_are_given_up_after_it_and_clean_up(tmp_path: Path, stages: list[Stage]) -> None:
    stages.append(stage := Stage(tmp_path, seconds=0))
    stage.wait_for(2)
    status, output, _ = stage.end()
    assert status == 75
    assert "Interrupted stopped with 100 of 100 units to do" in output
    assert list(stage.finished.iterdir()) == []
    assert list(stage.temporary.glob("clipmill-*")) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (15, GIVE_UP_SECONDS)),
        ({"RAY_JOB_STOP_WAIT_TIME_S": "600"}, (15, GIVE_UP_SECONDS)),
        ({"RAY_JOB_STOP_WAIT_TIME_S": "30"}, (10, GIVE_UP_SECONDS)),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, (0, 1.5)),
    ],
)
def test_the_grace_period_fits_that_of_a_job(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[float, float]
) -> None:
    for name in ("RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert drain_seconds(ClusterConfig()) == expected
