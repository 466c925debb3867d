from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from clipmill.cluster import Report, connect, is_embedded, run_workers
from clipmill.cluster.mailbox import Mailbox
from clipmill.config import ClusterConfig
from clipmill.errors import StageFailed, UserError

DRIVER = Path(__file__).with_name("driver.py")


def run(train: Any, payload: Any, *, workers: int = 1, max_failures: int = 0) -> list[dict[str, Any]]:
    progress: list[dict[str, Any]] = []
    config = ClusterConfig(training_workers=workers, training_cpus=1, max_failures=max_failures)
    run_workers(train, payload, config=config, name="test", on_progress=progress.append)
    return progress


def train_sum(folder: str, report: Report) -> None:
    """All-reduces the ranks; in the first attempt rank 1 kills itself between two collectives."""
    import torch

    first_attempt = not Path(folder, "killed").exists()
    total = torch.tensor([float(os.environ["RANK"]) + 1])
    torch.distributed.all_reduce(total)
    if first_attempt and os.environ["RANK"] == "1":
        Path(folder, "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
    assert not first_attempt
    assert int(os.environ["MASTER_PORT"]) > 0
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    report.update({"sum": -1.0})
    report.update({"sum": total.item(), "threads": torch.get_num_threads(), **{k: os.environ[k] for k in names}})


@pytest.mark.usefixtures("embedded")
def test_ranks_share_a_process_group_and_a_killed_one_restarts_it(tmp_path: Path) -> None:
    progress = run(train_sum, str(tmp_path), workers=2, max_failures=1)
    newest = {update["RANK"]: update for update in progress if update["sum"] > 0}
    no_gpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    same = {"sum": 3.0, "threads": 1, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **no_gpu}
    assert newest == {rank: {"RANK": rank, "LOCAL_RANK": rank, **same} for rank in ("0", "1")}


def train_badly(payload: tuple[str, str], _: Report) -> None:
    folder, kind = payload
    Path(folder, f"attempt-{time.time_ns()}").touch()
    raise {"user": UserError("lr must be positive"), "crash": ZeroDivisionError("by zero")}[kind]


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("kind", "error", "message", "attempts"),
    [
        ("user", UserError, r"^lr must be positive$", 1),
        pytest.param(
            "crash",
            StageFailed,
            "training workers failed: rank 0: ZeroDivisionError: by zero$",
            2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_only_crashes_are_tried_again(tmp_path: Path, kind: str, error: type, message: str, attempts: int) -> None:
    with pytest.raises(error, match=message) as caught:
        run(train_badly, (str(tmp_path), kind), max_failures=1)
    assert type(caught.value) is error
    assert len(list(tmp_path.iterdir())) == attempts
    assert (caught.value.__cause__ is None) == (kind == "user")


def train_and_leave_the_other_waiting(folder: str, _: Report) -> None:
    import torch

    if os.environ["RANK"] == "1":
        Path(folder, f"attempt-{time.time_ns()}").touch()
        raise UserError("only rank 1 sees it")
    torch.distributed.barrier()


@pytest.mark.slow  # waits PEER_GRACE_SECONDS for the other rank
@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("max_failures", [0, 1])
def test_a_rank_that_gives_up_alone_ends_the_group(tmp_path: Path, max_failures: int) -> None:
    with pytest.raises(UserError, match=r"^only rank 1 sees it$"):
        run(train_and_leave_the_other_waiting, str(tmp_path), workers=2, max_failures=max_failures)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("embedded")
def test_impossible_workers_are_a_user_error_at_once() -> None:
    with pytest.raises(UserError, match=r"9 worker\(s\) of 1 CPU do not fit"):
        run(train_sum, None, workers=9)


class Driver:
    """A driver process in a session of its own, at work when the constructor returns."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.errors = folder.with_name("stderr")
        with self.errors.open("w") as errors:
            command = [sys.executable, str(DRIVER), mode, str(folder)]
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("at work"):
                break
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def rest(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output.strip().splitlines()[-1]

    def survivors(self, timeout_seconds: float = 60) -> list[psutil.Process]:
        return psutil.wait_procs(self.family, timeout=timeout_seconds)[1]


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    """Drivers that a test appends; whatever happens, they do not outlive it."""
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (folder := tmp_path / "run").mkdir()
    return folder


def test_sigterm_ends_a_fan_out_with_status_75(folder: Path, drivers: list[Driver]) -> None:
    drivers.append(driver := Driver("fan_out", folder))
    driver.process.send_signal(signal.SIGTERM)
    status, line = driver.rest()
    assert (status, line.split()[0]) == (75, "Interrupted")
    assert driver.survivors() == []
    assert 0 < len(list(folder.iterdir())) < 1000


def test_ctrl_c_lets_the_training_workers_checkpoint(folder: Path, drivers: list[Driver]) -> None:
    drivers.append(driver := Driver("train", folder))
    os.killpg(driver.process.pid, signal.SIGINT)  # what a terminal does: Ray's own processes must not mind
    status, line = driver.rest()
    assert status == 75
    assert line.startswith("Interrupted stopped after step")
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]
    assert driver.survivors() == []
    errors = driver.errors.read_text()
    assert "stopping: the training workers finish a checkpoint first" in errors
    assert [line for line in errors.splitlines() if "TrainController" in line or "Cleaner" in line] == []


@pytest.mark.parametrize("mode", ["fan_out", pytest.param("train", marks=pytest.mark.slow)])
def test_an_embedded_ray_dies_with_a_killed_driver(folder: Path, drivers: list[Driver], mode: str) -> None:
    drivers.append(driver := Driver(mode, folder))
    assert any("raylet" in process.name() for process in driver.family)
    driver.process.kill()
    # Ray's two idle agents look for the dead head for a minute before they follow it.
    others = [process.name() for process in driver.survivors() if not process.name().endswith("Agent")]
    assert others == []
    if mode == "train":
        assert driver.survivors(timeout_seconds=100) == []


def connect_once(address: str) -> str:
    """The UserError of an attempt to connect, in a process of its own: this one may hold a Ray already."""
    script = (
        "import sys\nfrom clipmill.cluster import connect\nfrom clipmill.config import ClusterConfig\n"
        "from clipmill.errors import UserError\n"
        "try:\n    with connect(ClusterConfig(address=sys.argv[1])): print('connected')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, address], capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("http://127.0.0.1:8265", "is not a Ray head (HOST:6379)"),
        ("somewhere", "must be HOST:PORT"),
    ],
)
def test_a_wrong_address_is_one_clear_line(address: str, message: str) -> None:
    output = connect_once(address)
    assert message in output
    assert "\n" not in output


@pytest.mark.slow  # CONNECT_TIMEOUT_SECONDS
def test_a_server_that_is_no_ray_head_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert f"what answers at {address} is not a Ray head" in connect_once(address)


def test_embedded_unless_an_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_embedded(ClusterConfig())
    assert not is_embedded(ClusterConfig(address="10.0.0.1:6379"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_embedded(ClusterConfig())


def test_a_stop_never_parts_a_group_of_ranks() -> None:
    async def hold_and_stop() -> list[object]:
        mailbox = Mailbox(num_ranks=2)
        first = await mailbox.begin(0), await mailbox.hold(0)
        await mailbox.request_stop()
        second = await mailbox.hold(1)  # rank 0 would wait for it
        for rank in (0, 1):
            await mailbox.release(rank)
        return [first, second, await mailbox.hold(0), await mailbox.begin(1), (await mailbox.take()).verdict]

    *answers, verdict = asyncio.run(hold_and_stop())
    assert answers == [(1, True), True, False, None]
    assert verdict == ("Interrupted", "stopped; submit the same command to go on")


def test_importing_the_package_does_not_import_ray() -> None:
    check = "import clipmill.cluster, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@pytest.mark.usefixtures("embedded")
def test_connections_nest() -> None:
    import ray

    with connect(ClusterConfig(num_cpus=1)):
        assert ray.cluster_resources()["CPU"] == 3
    assert ray.is_initialized()
