"""What `clipmill status`, `logs` and `stop` say about a run, whatever has become of its drivers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from clipmill import status, storage
from clipmill.board import BOARD
from clipmill.errors import Interrupted, StageFailed, StopRequested, UserError
from clipmill.lease import SCHEMA, Lease, hold, read_claim
from clipmill.progress import duration
from clipmill.status import read
from clipmill.status.log import PART_BYTES
from clipmill.status.show import render
from tests.storage.s3_server import S3Server

DRIVER = """
import signal, sys, time
from clipmill.errors import ClipmillError, Interrupted
from clipmill.lease import hold
from clipmill.progress import bar
from clipmill.status import publishing

def on_signal(number, frame):
    if "deaf" not in sys.argv:
        sys.exit(75)

signal.signal(signal.SIGTERM, on_signal)
try:
    with hold(sys.argv[1], "shard", heartbeat_seconds=0.2) as lease, publishing(lease, "shard", 0.2):
        with bar("shard", total=10, unit="videos") as progress:
            progress.update(0)
            progress.update(3)
            print("held", flush=True)
            for _ in range(600):
                time.sleep(0.1)
except ClipmillError as error:
    sys.exit(error.exit_status)
"""


@contextlib.contextmanager
def shard(root: str) -> Iterator[Lease]:
    """The stage, in this process."""
    with hold(f"{root}/clips", "shard") as lease, status.publishing(lease, "shard"):
        yield lease


def driver(root: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, f"{root}/clips", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def wait_for_progress(root: str) -> None:
    deadline = time.monotonic() + 30
    while (found := shard_of(root).record) is None or found.progress is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def shard_of(root: str) -> status.StageStatus:
    return next(one for one in status.read_run(root) if one.stage == "shard")


def text_of(root: str) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(root, status.read_run(root)))
    return console.export_text()


def test_a_running_stage_a_killed_one_and_one_that_has_not_begun(tmp_path: Path) -> None:
    process = driver(str(tmp_path))
    try:
        wait_for_progress(str(tmp_path))
        first, *others = status.read_run(str(tmp_path))
        assert (first.shown, first.record and first.record.progress and first.record.progress.done) == ("running", 3)
        assert [one.shown for one in others] == ["not begun"] * 6
        assert "3/10 videos" in text_of(str(tmp_path))
    finally:
        process.kill()
        process.wait()
    assert (shard_of(str(tmp_path)).shown, shard_of(str(tmp_path)).note) == (
        "lost",
        f"process {process.pid} on this host is gone",
    )


def test_a_request_through_the_storage_stops_a_stage_in_order(tmp_path: Path) -> None:
    process = driver(str(tmp_path))
    said = list(status.stop(str(tmp_path), "shard"))
    assert process.wait(30) == 76
    assert said[-1] == "shard has stopped; run the same command to go on"
    assert shard_of(str(tmp_path)).shown == "stopped"
    with pytest.raises(UserError, match="shard does not run at"):
        list(status.stop(str(tmp_path), "shard"))
    with pytest.raises(UserError, match="no stage 'shards'"):
        list(status.stop(str(tmp_path), "shards"))


def test_the_folder_is_free_before_ray_kills_a_driver_that_still_works(tmp_path: Path) -> None:
    process = driver(str(tmp_path), "deaf", RAY_JOB_STOP_WAIT_TIME_S="3")
    try:
        process.send_signal(signal.SIGTERM)
        time.sleep(3)
        claim = read_claim(f"{tmp_path}/clips")
        assert claim is not None
        assert claim.is_released
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert shard_of(str(tmp_path)).shown == "lost"


@pytest.mark.parametrize(
    ("error", "shown", "text"),
    [
        (None, "finished", ""),
        (StageFailed("12 of 12 units failed"), "failed", "12 of 12 units failed"),
        (Interrupted("stopped after step 7"), "interrupted", "stopped after step 7"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_how_a_stage_ended_is_shown(tmp_path: Path, error: Exception | None, shown: str, text: str) -> None:
    with contextlib.suppress(type(error or ValueError())), shard(str(tmp_path)):
        BOARD.advance(10, 10, "videos", {"clips": 30})
        if error:
            raise error
    found = shard_of(str(tmp_path))
    assert (found.shown, (found.record and found.record.error) or "") == (shown, text)
    assert text in text_of(str(tmp_path))
    if isinstance(error, ZeroDivisionError):
        assert "Traceback" in status.read_log(found.url)


def test_a_stop_is_told_from_other_interruptions(tmp_path: Path) -> None:
    def work() -> None:
        with shard(str(tmp_path)) as lease:
            lease.stop_requested.set()
            raise Interrupted("stopped with 3 units to do")

    with pytest.raises(StopRequested):
        work()
    assert shard_of(str(tmp_path)).shown == "stopped"


def test_causes_are_counted_and_the_document_stays_small(tmp_path: Path) -> None:
    with shard(str(tmp_path)):
        for number in range(5000):
            BOARD.count("quarantine", "moov atom not found" if number % 2 else f"{number} is no video " + "x" * 500)
        BOARD.count("failures", "the worker process died")
        BOARD.note(sick_nodes=[f"host-{number}" for number in range(1000)])
        for number in range(100):
            logging.getLogger("clipmill").warning("line %d %s", number, "y" * 1000)
    found = shard_of(str(tmp_path)).record
    assert found is not None
    assert (found.quarantine[0].cause, found.quarantine[0].count) == ("moov atom not found", 2500)
    assert sum(one.count for one in found.quarantine) == 5000
    assert [(one.cause, one.count) for one in found.failures] == [("the worker process died", 1)]
    assert (tmp_path / "clips" / "status.json").stat().st_size < 8000


def test_a_log_has_every_line_of_an_attempt_in_order(tmp_path: Path) -> None:
    url = f"{tmp_path}/clips"
    lines = [f"message {number} " + "z" * 100 for number in range(3 * PART_BYTES // 100)]
    for _ in range(2):
        with hold(url, "shard") as lease, status.publishing(lease, "shard", every_seconds=0.05):
            for line in lines:
                logging.getLogger("clipmill").warning("%s", line)
    assert [line.partition(" ")[2] for line in status.read_log(url).splitlines()] == lines
    assert status.read_log(url, attempt=1)
    assert max(path.stat().st_size for path in (tmp_path / "clips" / "logs").iterdir()) == PART_BYTES
    with pytest.raises(UserError, match=r"no log of attempt 3 .* choose from \[1, 2\]"):
        status.read_log(url, attempt=3)
    with pytest.raises(UserError, match="no log at"):
        status.read_log(f"{tmp_path}/vqvae")


def test_credentials_are_in_no_status_and_in_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "MARKER-OF-A-KEY")
    with contextlib.suppress(StageFailed), shard(str(tmp_path)):
        logging.getLogger("clipmill").warning(
            "cannot read https://me:MARKER-IN-URL@host/a?X-Amz-Signature=MARKER-SIGNED"
        )
        BOARD.count("quarantine", "refused with MARKER-OF-A-KEY")
        BOARD.note(source="s3://user:MARKER-IN-URL@bucket/key")
        raise StageFailed("the secret MARKER-OF-A-KEY does not fit")
    for path in (tmp_path / "clips").rglob("*"):
        assert path.is_dir() or b"MARKER" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"schema": 1}', b'{"schema": 99}', b'{"schema": 1, "stage": 7}', b"\xff"]
)
def test_a_damaged_status_is_one_line_and_hides_nothing_else(tmp_path: Path, content: bytes) -> None:
    with shard(str(tmp_path)):
        pass
    (tmp_path / "clips" / "status.json").write_bytes(content)
    storage.publish_document(f"{tmp_path}/clips/summary.json", {}, 1)
    found = shard_of(str(tmp_path))
    assert found.shown == "finished"
    assert "clips/status.json" in found.note
    assert "\n" not in found.note


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stage has begun at"):
        status.read_run(f"{tmp_path}/nowhere")


def _another_host(url: str, beat: int) -> None:
    claim = {"stage": "shard", "released": False, "beat": beat, "host": "far", "boot": "?", "pid_namespace": "?"}
    storage.publish_document(f"{url}/_lease/000001.json", {**claim, "pid": 1, "process_start": "1"}, SCHEMA)


@pytest.mark.parametrize("ahead_seconds", [-3600, 3600], ids=["old", "of a clock ahead"])
def test_a_status_of_a_lost_cluster_is_shown_with_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_seconds: int
) -> None:
    url = f"{tmp_path}/clips"
    with hold(url, "shard") as lease, status.publishing(lease, "shard"):
        pass
    document = json.loads((tmp_path / "clips" / "status.json").read_text())
    document |= {"state": "running", "written": time.time() + ahead_seconds}
    (tmp_path / "clips" / "status.json").write_text(json.dumps(document))
    _another_host(url, beat=4)
    monkeypatch.setattr(read, "WATCH_SECONDS", 1)
    found = shard_of(str(tmp_path))
    assert (found.shown, found.note) == ("lost", "its driver on far does not respond; its cluster may be gone")
    assert ("60 min ahead" if ahead_seconds > 0 else "as of 60 min ago") in text_of(str(tmp_path))
    monkeypatch.setattr(read.time, "sleep", lambda _: _another_host(url, beat=5))
    assert shard_of(str(tmp_path)).shown == "running"  # its clock differs
    assert status.release_gone(str(tmp_path)) == ["shard"]
    with hold(url, "shard", silence_seconds=600):
        pass


def driver_of_another_host(root: str) -> subprocess.Popen[str]:
    """A driver in a namespace of processes of its own: to us, and to `status`, it is on another machine."""
    isolated = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot make a namespace of processes here")
    process = subprocess.Popen(
        [*isolated, sys.executable, "-c", DRIVER, f"{root}/clips"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_folders_are_released_only_if_their_cluster_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, here = str(tmp_path), f"process {os.getpid()}"
    refusal = rf"^nothing was released: train-vqvae still runs on .*{here}.*stop it with"
    with hold(f"{root}/vqvae", "train-vqvae"), pytest.raises(UserError, match=refusal):
        status.release_gone(root)
    process = driver_of_another_host(root)
    try:
        claim = read_claim(f"{root}/clips")
        assert claim is not None
        assert claim.is_alive is None
        with pytest.raises(UserError, match=r"^nothing was released: shard still runs on") as refused:
            status.release_gone(root)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match="is in use by shard"), hold(f"{root}/clips", "shard", silence_seconds=5):
            pass
    finally:
        process.kill()
        process.wait()
    monkeypatch.setattr(read, "WATCH_SECONDS", 3)
    assert status.release_gone(root) == ["shard"]
    assert status.release_gone(root) == []
    began = time.monotonic()
    with hold(f"{root}/clips", "shard", silence_seconds=600):
        assert time.monotonic() - began < 60


def test_a_run_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server()
    server.use(monkeypatch)
    try:
        with hold("s3://bucket/run/clips", "shard") as lease, status.publishing(lease, "shard"):
            logging.getLogger("clipmill").warning("planned")
            while server.requests["PUT run/clips/status.json"] < 1:
                time.sleep(0.05)
            for number in range(1000):
                BOARD.advance(number, 1000, "videos", {})
            assert server.requests["PUT run/clips/status.json"] == 1
        server.objects["run/evaluation/_parts/a.npz"] = b""
        with hold("s3://bucket/run/evaluation/walks", "evaluate") as lease, status.publishing(lease, "evaluate"):
            pass
        for name in ("walks", "jumps"):
            with hold(f"s3://bucket/run/samples/{name}", "sample") as lease, status.publishing(lease, "sample"):
                pass
        found = {one.stage: one.shown for one in status.read_run("s3://bucket/run")}
        assert found["shard"] == found["sample/jumps"] == found["sample/walks"] == found["evaluate"] == "finished"
        assert found["report"] == "not begun"
        assert "planned" in status.read_log(status.folder_of("s3://bucket/run", "shard"))
    finally:
        server.stop()


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 4.21, 89, 90, 5399, 7260, 200_000)] == [
        "0 s", "4.21 s", "89 s", "2 min", "1 h 30 min", "2 h 1 min", "2 d 7 h",
    ]  # fmt: skip


def test_the_log_as_json_lines_has_stage_attempt_and_unit_and_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIPMILL_LOG_FORMAT", "json")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "MARKER-OF-A-KEY")
    handler = logging.StreamHandler()
    handler.setFormatter(status.formatter())
    logger = logging.getLogger("clipmill.test")
    logger.addHandler(handler)
    try:
        with shard(str(tmp_path)):
            logger.warning(
                "unit %s failed: MARKER-OF-A-KEY\nsecond line", "train/000007", extra={"unit": "train/000007"}
            )
    finally:
        logger.removeHandler(handler)
    [line] = capsys.readouterr().err.splitlines()
    facts = json.loads(line)
    assert facts.pop("time").endswith("+00:00")
    assert facts == {
        "level": "warning",
        "logger": "clipmill.test",
        "message": "unit train/000007 failed: ***\nsecond line",
        "stage": "shard",
        "attempt": 1,
        "unit": "train/000007",
    }
    monkeypatch.setenv("CLIPMILL_LOG_FORMAT", "xml")
    with pytest.raises(UserError, match="CLIPMILL_LOG_FORMAT=xml"):
        status.formatter()


def test_seconds_are_those_of_all_attempts(tmp_path: Path) -> None:
    root = str(tmp_path)
    process = driver(root)
    wait_for_progress(root)
    process.kill()  # it counts up to its last word
    process.wait()
    killed = shard_of(root).record
    assert killed is not None
    assert 0 < killed.seconds <= killed.written - killed.began + 0.1
    with shard(root):
        assert killed.seconds <= BOARD.seconds < killed.seconds + 5
    finished = shard_of(root).record
    assert finished is not None
    assert killed.seconds < finished.seconds
