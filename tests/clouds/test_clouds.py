"""`clipmill.storage` on Azure and Google: what S3's tests ask, as far as the emulators know it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from clipmill import storage
from clipmill.errors import StorageUnavailable, UserError
from clipmill.lease import hold
from clipmill.shards.prune import prune
from clipmill.shards.verify import verify
from clipmill.storage import connection, retries
from tests.clouds.emulators import OTHER_KEY, Azurite, FakeGCS
from tests.pipeline.corpus import run_config, write_corpus

REPOSITORY = Path(__file__).parents[2]


def test_objects_and_listings(bucket_url: str, tmp_path: Path) -> None:
    storage.publish_bytes(f"{bucket_url}/a/one.bin", b"1")
    storage.publish_bytes(f"{bucket_url}/a/one.bin", b"2")
    storage.publish_bytes(f"{bucket_url}/a/deep/two.bin", b"22")
    assert storage.read_bytes(f"{bucket_url}/a/one.bin") == b"2"
    assert storage.read_start(f"{bucket_url}/a/deep/two.bin", 1) == b"2"
    assert [entry.name for entry in storage.list_folder(f"{bucket_url}/a")] == ["one.bin"]
    assert storage.list_folders(f"{bucket_url}/a") == ["deep"]
    walked = list(storage.walk(f"{bucket_url}/a"))
    assert [(entry.name, entry.bytes) for entry in walked] == [("deep/two.bin", 2), ("one.bin", 1)]
    assert all(entry.etag and abs(time.time() - (entry.modified or 0)) < 600 for entry in walked)
    assert [entry.name for entry in storage.walk(f"{bucket_url}/a", "deep/two.bin")] == ["one.bin"]
    assert storage.stat(f"{bucket_url}/a/one.bin").bytes == 1
    assert storage.list_folder(f"{bucket_url}/absent") == []
    assert not storage.exists(f"{bucket_url}/absent")
    for ask in (storage.read_bytes, storage.stat, lambda url: storage.fetch(url, tmp_path / "absent")):
        with pytest.raises(FileNotFoundError):
            ask(f"{bucket_url}/absent")
    storage.remove(f"{bucket_url}/absent")
    storage.remove_tree(f"{bucket_url}/a")
    assert list(storage.walk(bucket_url)) == []


def test_a_large_file_there_and_back(bucket_url: str, tmp_path: Path) -> None:
    data = os.urandom(12 * 2**20)
    (tmp_path / "shard.tar").write_bytes(data)
    storage.publish_file(tmp_path / "shard.tar", f"{bucket_url}/shard.tar")
    storage.fetch(f"{bucket_url}/shard.tar", tmp_path / "back.tar")
    assert (tmp_path / "back.tar").read_bytes() == data
    with storage.open_to_read(f"{bucket_url}/shard.tar") as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == data[-1000:]


def test_of_many_creators_one_wins(bucket_url: str) -> None:
    storage.check_create(f"{bucket_url}/run")
    barrier = threading.Barrier(8)

    def create(number: int) -> bool:
        barrier.wait()
        return storage.create_bytes(f"{bucket_url}/one.json", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as writers:
        won = list(writers.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(f"{bucket_url}/one.json") == f"writer {won.index(True)}".encode()


def test_a_folder_has_one_owner(bucket_url: str) -> None:
    with (
        hold(f"{bucket_url}/clips", "shard"),
        pytest.raises(UserError, match="in use by shard"),
        hold(f"{bucket_url}/clips", "shard"),
    ):
        pass


@pytest.mark.parametrize(
    "operate",
    [
        lambda url: storage.create_bytes(f"{url}/a", b"a"),
        lambda url: storage.publish_bytes(f"{url}/a", b"a"),
        storage.check_create,
    ],
    ids=["create", "publish", "probe"],
)
def test_a_missing_bucket_is_one_line(emulator: Azurite | FakeGCS, operate) -> None:
    with pytest.raises(UserError, match=r"the bucket no-such-bucket of .* does not exist; create it") as caught:
        operate(f"{emulator.scheme}://no-such-bucket/run")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_away_has_a_deadline(emulator: Azurite | FakeGCS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.RETRY_SECONDS_VARIABLE, "2")
    other = type(emulator)()  # nobody serves there
    for name, value in other.environment().items():
        monkeypatch.setenv(name, value)
    connection._connected.cache_clear()
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match="did not recover within 2 s"):
        storage.read_bytes(f"{emulator.scheme}://bucket/a")
    assert time.monotonic() - began < 30, "the client repeats requests by itself"


def test_a_server_that_comes_back_is_waited_for(emulator: Azurite | FakeGCS, monkeypatch: pytest.MonkeyPatch) -> None:
    other = type(emulator)()
    for name, value in other.environment().items():
        monkeypatch.setenv(name, value)
    connection._connected.cache_clear()

    def serve() -> None:
        other.serve()
        other.create_bucket("bucket")

    back = threading.Timer(2, serve)
    back.start()
    try:
        with pytest.raises(FileNotFoundError):  # an answer: nothing is there yet
            storage.read_bytes(f"{emulator.scheme}://bucket/a")
    finally:
        back.join()
        other.kill()


def test_wrong_keys_are_one_line(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, says in ((OTHER_KEY, "access denied"), ("no key", "correct the URL, AZURE_STORAGE_CONNECTION_STRING")):
        monkeypatch.setenv(
            "AZURE_STORAGE_CONNECTION_STRING", azurite.environment(key)["AZURE_STORAGE_CONNECTION_STRING"]
        )
        connection._connected.cache_clear()
        with pytest.raises(UserError, match=says) as caught:
            storage.publish_bytes("az://bucket/a", b"a")
        assert key not in str(caught.value)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    connection._connected.cache_clear()
    with pytest.raises(UserError, match="correct the URL, AZURE_STORAGE_CONNECTION_STRING"):
        storage.exists("az://bucket/a")


def test_requests_are_not_logged(bucket_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for number in range(3):
            storage.publish_bytes(f"{bucket_url}/{number}", b"1")
        list(storage.walk(bucket_url))
    assert len(caplog.records) < 4, "Azure's client says a page about each request"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_from_bucket_to_bucket(bucket_url: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "raw", videos_per_class=2)
    for entry in storage.walk(str(tmp_path / "raw")):
        storage.publish_file(tmp_path / "raw" / entry.name, f"{bucket_url}/raw/{entry.name}")
    document = run_config(Path("unused"), Path("unused")).model_dump(mode="json", exclude_unset=True)
    document["root"], document["data"]["source"]["url"] = f"{bucket_url}/run", f"{bucket_url}/raw"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "clipmill.cli", "shard", "--config", str(tmp_path / "run.yaml")]
    for summary in ("made", "nothing to do"):
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (summary == "nothing to do") == ("nothing to do" in done.stderr)
        assert len(done.stderr.splitlines()) < 60, "a client logs its requests"
        if summary == "made":
            assert json.loads(done.stdout)["stage"] == "shard"
    train = f"{bucket_url}/run/clips/train"
    storage.publish_bytes(f"{train}/clips-000099-00-of-01.tar", b"nobody's")
    report = verify(train, deep=True)
    assert (report.problems, len(report.orphans)) == ([], 1)
    assert prune(train, report.orphans, grace_seconds=3600) == []
    time.sleep(2)
    assert prune(train, report.orphans, grace_seconds=1) == report.orphans
