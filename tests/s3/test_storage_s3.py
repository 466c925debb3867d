from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session
import pytest

from clipmill import storage
from clipmill.errors import StorageUnavailable, UserError
from clipmill.lease import hold
from clipmill.storage import connection, retries
from tests.s3.gateway import Gateway
from tests.s3.proxy import Proxy

# Not slow by itself, but the server takes some fifteen seconds to start.
pytestmark = pytest.mark.slow

LARGE_BYTES = 120 * 2**20
"""More than two parts of 50 MiB: s3fs uploads it in parts."""


@pytest.fixture
def through_proxy(bucket_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bucket, by way of the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    connection._connected.cache_clear()
    return bucket_url


def uploads_of(url: str) -> list[str]:
    """Keys of the multipart uploads that nobody finished or aborted."""
    client = botocore.session.get_session().create_client("s3")
    answer = client.list_multipart_uploads(Bucket=url.removeprefix("s3://"))
    return [upload["Key"] for upload in answer.get("Uploads", [])]


def test_objects_and_listings(bucket_url: str, tmp_path: Path) -> None:
    storage.publish_bytes(f"{bucket_url}/a/one.bin", b"1")
    storage.publish_bytes(f"{bucket_url}/a/one.bin", b"2")
    storage.publish_bytes(f"{bucket_url}/a/deep/two.bin", b"22")
    assert storage.read_bytes(f"{bucket_url}/a/one.bin") == b"2"
    assert [entry.name for entry in storage.list_folder(f"{bucket_url}/a")] == ["one.bin"]
    assert storage.list_folders(f"{bucket_url}/a") == ["deep"]
    walked = list(storage.walk(f"{bucket_url}/a"))
    assert {entry.name: entry.bytes for entry in walked} == {"one.bin": 1, "deep/two.bin": 2}
    assert all(entry.etag and entry.modified for entry in walked)
    assert storage.list_folder(f"{bucket_url}/absent") == []
    assert not storage.exists(f"{bucket_url}/absent")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{bucket_url}/absent")
    with pytest.raises(FileNotFoundError):
        storage.fetch(f"{bucket_url}/absent", tmp_path / "absent")
    storage.remove(f"{bucket_url}/absent")
    storage.remove_tree(f"{bucket_url}/a")
    assert list(storage.walk(bucket_url)) == []


def test_objects_that_stand_for_folders_are_no_files(bucket_url: str) -> None:
    client = botocore.session.get_session().create_client("s3")
    for key in ("a/", "a/one.mp4", "a/two.mp4/", "a/two.mp4/deep.mp4", "a/three.mp4_$folder$", "a/_SUCCESS"):
        client.put_object(Bucket=bucket_url.removeprefix("s3://"), Key=key, Body=b"")
    assert [entry.name for entry in storage.walk(bucket_url)] == ["a/_SUCCESS", "a/one.mp4", "a/two.mp4/deep.mp4"]
    assert [entry.name for entry in storage.list_folder(f"{bucket_url}/a")] == ["_SUCCESS", "one.mp4"]
    assert storage.list_folders(f"{bucket_url}/a") == ["two.mp4"]


def test_of_many_creators_one_wins(bucket_url: str) -> None:
    url = f"{bucket_url}/one.json"
    barrier = threading.Barrier(8)

    def create(number: int) -> bool:
        barrier.wait()
        return storage.create_bytes(url, f"writer {number}".encode())

    with ThreadPoolExecutor(8) as writers:
        won = list(writers.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(url) == f"writer {won.index(True)}".encode()


def test_a_create_whose_answer_was_lost_knows_its_own_object(through_proxy: str, proxy: Proxy) -> None:
    proxy.num_lost_answers = 1
    assert storage.create_bytes(f"{through_proxy}/mine.json", b"mine")
    assert (proxy.num_lost_answers, proxy.num_puts) == (0, 2)
    proxy.num_lost_answers = 1
    assert not storage.create_bytes(f"{through_proxy}/mine.json", b"somebody else's")
    assert storage.read_bytes(f"{through_proxy}/mine.json") == b"mine"


def test_a_lease_is_taken_though_the_answer_was_lost(through_proxy: str, proxy: Proxy) -> None:
    proxy.num_lost_answers = 1
    with hold(f"{through_proxy}/clips", "shard") as lease:
        lease.check()
        with pytest.raises(UserError, match="in use by shard"), hold(f"{through_proxy}/clips", "shard"):
            pass
    with hold(f"{through_proxy}/clips", "shard") as lease:
        assert lease.attempt == 2


@pytest.mark.parametrize(("num_bytes", "cut_after_bytes"), [(3 * 2**20, 2**20), (LARGE_BYTES, 10 * 2**20)])
def test_a_cut_upload_is_repeated(
    through_proxy: str, proxy: Proxy, tmp_path: Path, num_bytes: int, cut_after_bytes: int
) -> None:
    (tmp_path / "shard.tar").write_bytes(os.urandom(num_bytes))
    proxy.num_cuts, proxy.cut_after_bytes = 2, cut_after_bytes
    storage.publish_file(tmp_path / "shard.tar", f"{through_proxy}/shard.tar")
    assert proxy.num_cuts == 0
    storage.fetch(f"{through_proxy}/shard.tar", tmp_path / "back.tar")
    assert (tmp_path / "back.tar").read_bytes() == (tmp_path / "shard.tar").read_bytes()


@pytest.mark.parametrize("num_bytes", [3 * 2**20, LARGE_BYTES])
def test_an_upload_that_is_always_cut_leaves_nothing_visible(
    through_proxy: str,
    bucket_url: str,
    proxy: Proxy,
    gateway: Gateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_bytes: int,
) -> None:
    monkeypatch.setenv(retries.RETRY_SECONDS_VARIABLE, "2")
    (tmp_path / "shard.tar").write_bytes(os.urandom(num_bytes))
    proxy.num_cuts, proxy.cut_after_bytes = 1000, 2**20
    with pytest.raises(StorageUnavailable, match=r"did not recover within 2 s .* run the same command again"):
        storage.publish_file(tmp_path / "shard.tar", f"{through_proxy}/shard.tar")
    assert list(storage.walk(bucket_url)) == []
    assert uploads_of(bucket_url) == []


def test_a_slow_line_is_waited_for(through_proxy: str, proxy: Proxy, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(os.urandom(2**20))
    proxy.bytes_per_second = 2**19
    storage.publish_file(tmp_path / "video.mp4", f"{through_proxy}/video.mp4")
    storage.fetch(f"{through_proxy}/video.mp4", tmp_path / "back.mp4")
    assert (tmp_path / "back.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()


def test_a_server_that_comes_back_is_waited_for(bucket_url: str, gateway: Gateway) -> None:
    storage.publish_bytes(f"{bucket_url}/before", b"before")
    gateway.kill()
    back = threading.Timer(3, gateway.serve)
    back.start()
    try:
        assert storage.read_bytes(f"{bucket_url}/before") == b"before"
        assert storage.create_bytes(f"{bucket_url}/after", b"after")
        assert [entry.name for entry in storage.list_folder(bucket_url)] == ["after", "before"]
    finally:
        back.join()


def test_an_outage_has_a_deadline(bucket_url: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.RETRY_SECONDS_VARIABLE, "2")
    gateway.kill()
    try:
        began = time.monotonic()
        with pytest.raises(StorageUnavailable, match="AWS_ENDPOINT_URL"):
            storage.exists(f"{bucket_url}/a")
        assert time.monotonic() - began < 30
    finally:
        gateway.serve()


@pytest.mark.parametrize(
    "operate",
    [
        lambda url: storage.read_bytes(f"{url}/a"),
        lambda url: storage.exists(f"{url}/a"),
        lambda url: storage.list_folder(url),
        lambda url: list(storage.walk(url)),
        lambda url: storage.create_bytes(f"{url}/a", b"a"),
        lambda url: storage.publish_bytes(f"{url}/a", b"a"),
    ],
    ids=["read", "exists", "list", "walk", "create", "publish"],
)
def test_wrong_credentials(bucket_url: str, monkeypatch: pytest.MonkeyPatch, operate) -> None:
    for variable, value in (("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")):
        monkeypatch.setenv(variable, value)
        connection._connected.cache_clear()
        with pytest.raises(UserError, match="access denied"):
            operate(bucket_url)


@pytest.mark.parametrize(
    "operate",
    [
        lambda url: storage.read_bytes(f"{url}/a"),
        lambda url: storage.list_folder(f"{url}/a"),
        lambda url: list(storage.walk(f"{url}/a")),
        lambda url: storage.create_bytes(f"{url}/a", b"a"),
        lambda url: storage.publish_bytes(f"{url}/a", b"a"),
    ],
    ids=["read", "list", "walk", "create", "publish"],
)
def test_a_missing_bucket(credentials: None, operate) -> None:
    with pytest.raises(UserError, match=r"bucket no-such-bucket .* does not exist"):
        operate("s3://no-such-bucket")


def test_an_endpoint_that_is_no_address(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    connection._connected.cache_clear()
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        storage.exists(f"{bucket_url}/a")


def test_no_credentials(bucket_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    connection._connected.cache_clear()
    with pytest.raises(UserError, match="no credentials"):
        storage.exists(f"{bucket_url}/a")


def test_a_file_is_read_in_ranges_through_an_outage(bucket_url: str, gateway: Gateway) -> None:
    data = os.urandom(300_000)
    storage.publish_bytes(f"{bucket_url}/rows", data)
    with storage.open_to_read(f"{bucket_url}/rows", 2**16) as file:
        assert file.read(10) == data[:10]
        gateway.kill()
        back = threading.Timer(2, gateway.serve)
        back.start()
        try:
            file.seek(-1000, os.SEEK_END)
            assert file.read() == data[-1000:]
            file.seek(100)
            assert file.read(200_000) == data[100:200_100]
        finally:
            back.join()
    with pytest.raises(FileNotFoundError):
        storage.open_to_read(f"{bucket_url}/absent")
