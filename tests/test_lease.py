from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from clipmill import storage
from clipmill.errors import StageFailed, UserError
from clipmill.lease import SCHEMA, Lease, hold
from tests.storage.s3_server import S3Server

HOLDER = """
import sys, time
from clipmill.lease import hold
with hold(sys.argv[1], "shard", heartbeat_seconds=0.1):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(url: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_while_the_first_lives_and_takes_over_once_it_is_killed(tmp_path):
    url = str(tmp_path)
    first = holder(url)
    try:
        with pytest.raises(UserError, match=f"in use by shard .process {first.pid}"), hold(url, "shard"):
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    with hold(url, "shard") as lease:
        assert lease.attempt == 2
        lease.check()


def test_attempts_count_on_after_a_release(tmp_path):
    for attempt in (1, 2, 3):
        with hold(str(tmp_path), "shard") as lease:
            assert lease.attempt == attempt
    assert len(storage.list_folder(str(tmp_path / "_lease"))) == 1


def test_a_full_disk_at_the_release_does_not_hide_why_a_run_ended(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "publish_document", fill)
    with pytest.raises(StageFailed, match="12 of 12"), hold(str(tmp_path), "shard"):
        raise StageFailed("12 of 12 units failed")


def test_an_owner_that_lost_the_folder_notices_before_it_publishes(tmp_path):
    with hold(str(tmp_path), "train-prior") as lease:
        storage.create_document(str(tmp_path / "_lease" / "000002.json"), {"released": False}, SCHEMA)
        with pytest.raises(StageFailed, match="taken over by attempt 2"):
            lease.check()


def _claim_of_another_host(url: str, beat: int) -> None:
    body = {"stage": "shard", "released": False, "beat": beat, "host": "far", "boot": "?", "pid_namespace": "?"}
    storage.publish_document(
        storage.join(url, "_lease", "000001.json"), {**body, "pid": 1, "process_start": "1"}, SCHEMA
    )


def test_a_silent_owner_on_another_host_is_replaced(tmp_path):
    _claim_of_another_host(str(tmp_path), beat=3)
    with hold(str(tmp_path), "shard", silence_seconds=0.3) as lease:
        assert lease == Lease(str(tmp_path), 2)


def test_an_owner_on_another_host_whose_heart_beats_is_not(tmp_path):
    _claim_of_another_host(str(tmp_path), beat=3)
    beater = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from tests.test_lease import _claim_of_another_host\n"
            "for beat in range(4, 2000): _claim_of_another_host(sys.argv[1], beat); print(beat); time.sleep(0.05)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert beater.stdout.readline()
        with pytest.raises(UserError, match="on far"), hold(str(tmp_path), "shard", silence_seconds=8):
            pass
    finally:
        beater.kill()
        beater.wait()


def test_storage_that_overwrites_what_is_there_is_refused(monkeypatch):
    server = S3Server()
    server.use(monkeypatch)
    try:
        with hold("s3://bucket/run/clips", "shard"):
            pass
        server.is_fenced = False
        with pytest.raises(UserError, match="ignores If-None-Match"), hold("s3://bucket/run/clips", "shard"):
            pass
        assert not [key for key in server.objects if "probe" in key]
    finally:
        server.stop()
