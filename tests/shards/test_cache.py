"""Downloads: what is evicted, what comes ahead of time, and what a full disk says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from clipmill import storage
from clipmill.errors import StageFailed, StorageUnavailable, UserError
from clipmill.shards.cache import ShardCache, needed_cache_bytes
from clipmill.shards.manifest import Manifest
from tests.shards.folders import write_dataset

COUNTS = [5, 4, 12, 3, 9]


@pytest.fixture
def manifest(tmp_path):
    """A data set in a bucket of fsspec's memory file system, which belongs to this process."""
    memory = fsspec.filesystem("memory")
    folder = storage.local_path(write_dataset(tmp_path / "tokens", tmp_path, COUNTS).url)
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/cached/tokens/{path.relative_to(folder)}", path.read_bytes())
    yield Manifest.load("memory://cached/tokens", "tokens")
    memory.rm("/cached", recursive=True)


def downloads(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "shards").glob("*.tar")}


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def fail(monkeypatch, errors):
    """Makes the next fetches end in these errors, the later ones succeed; returns the URLs asked for."""
    asked, fetch = [], storage.fetch

    def failing(url, path):
        asked.append(url)
        if errors:
            raise errors.pop(0)
        fetch(url, path)

    monkeypatch.setattr(storage, "fetch", failing)
    return asked


def test_a_bucket_that_stays_away_names_the_shard_and_the_cause(manifest, tmp_path, monkeypatch):
    fail(monkeypatch, [StorageUnavailable("the storage did not recover within 120 s")])
    with pytest.raises(StageFailed, match=f"{manifest.shards[0].name} .*did not recover"):
        ShardCache(manifest, tmp_path / "cache", 2**30).open(0)


FILLER = """\
import sys
from pathlib import Path
import fsspec
from clipmill.errors import UserError
from clipmill.shards.cache import ShardCache
from clipmill.shards.manifest import Manifest

source, disk = map(Path, sys.argv[1:])
memory = fsspec.filesystem("memory")
for path in source.rglob("*.*"):
    memory.pipe_file(f"/tokens/{path.relative_to(source)}", path.read_bytes())
cache = ShardCache(Manifest.load("memory://tokens", "tokens"), disk / "cache", 2**30)
opened = []
try:
    for shard in range(99):
        opened.append(cache.open(shard))
except UserError as error:
    print(len(opened), error)
    print(sorted(path.suffix for path in (disk / "cache" / "shards").iterdir()))
"""


def test_a_full_disk_says_so(tmp_path):
    """A file system of 64 KiB in a mount namespace of the child's own; each shard takes 20 KiB."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k tmpfs"
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run([*namespace, f"{mount} {disk}"], capture_output=True).returncode:
        pytest.skip("this machine lets us mount nothing")
    write_dataset(tmp_path / "tokens", tmp_path, [6] * 99)
    command = f"{mount} {disk} && exec {sys.executable} -c '{FILLER}' {tmp_path / 'tokens'} {disk}"
    done = subprocess.run([*namespace, command], capture_output=True, text=True, env=child_environment())
    assert done.returncode == 0, done.stderr
    line, left = done.stdout.splitlines()
    num_opened, _, message = line.partition(" ")
    assert 0 < int(num_opened) < 4
    assert message.startswith("shard tokens-")
    assert f"no space left in {disk}/cache/shards for its 20,480 bytes; free some, lower cache_bytes" in message
    assert left.count(".tar") == int(num_opened)
    assert ".part" not in left


READER = """\
import fcntl, mmap, sys
with open(sys.argv[1], "rb") as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("reading", flush=True)
sys.stdin.read()
"""


def test_what_another_process_reads_stays_until_that_process_is_gone(manifest, tmp_path):
    folder = tmp_path / "cache"
    ShardCache(manifest, folder, 2**30).open(0)
    (path,) = (folder / "shards").glob("*.tar")
    command = [sys.executable, "-c", READER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"reading\n"
            small = ShardCache(manifest, folder, cache_bytes=1)
            small.open(1)
            small.open(2)
            assert downloads(folder) == {manifest.shards[0].sha256, manifest.shards[2].sha256}
        finally:
            reader.kill()  # no chance to clean up: the kernel ends its lock
    small.open(3)
    assert downloads(folder) == {manifest.shards[3].sha256}


def test_a_sample_in_flight_keeps_its_download(manifest, tmp_path):
    small = ShardCache(manifest, tmp_path / "cache", cache_bytes=1)
    sample = small.open(0).view[:512]
    small.open(1)
    assert downloads(tmp_path / "cache") == {manifest.shards[0].sha256, manifest.shards[1].sha256}
    del sample
    small.open(2)
    assert downloads(tmp_path / "cache") == {manifest.shards[2].sha256}


def test_prefetched_shards_are_there_when_they_are_opened(manifest, tmp_path, monkeypatch):
    cache = ShardCache(manifest, tmp_path / "cache", 2**30)
    cache.prefetch([0, 2, 3])
    deadline = time.monotonic() + 30
    while len(downloads(tmp_path / "cache")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked = fail(monkeypatch, [])
    for shard in (0, 2, 3):
        cache.open(shard)
    assert asked == []


def test_a_failed_prefetch_is_met_again_by_the_reader(manifest, tmp_path, monkeypatch):
    fail(monkeypatch, [PermissionError("denied")])
    cache = ShardCache(manifest, tmp_path / "cache", 2**30)
    cache.prefetch([0])
    assert cache._prefetchers is not None
    cache._prefetchers.shutdown()
    assert len(cache.open(0).offsets) == 6


def test_the_budget_that_an_order_needs(manifest):
    largest, total = max(shard.bytes for shard in manifest.shards), sum(shard.bytes for shard in manifest.shards)
    # 33 samples in 5 shards: a window of 6.6 samples spans one, and an end of it lies in two more
    assert needed_cache_bytes(manifest, 1, 6) == int((6 / 6.6 + 2) * largest)
    assert needed_cache_bytes(manifest, 64, 4096) == total


def test_a_default_folder_that_somebody_else_made_is_not_used(manifest, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"clipmill-{os.getuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match="cannot be trusted"):
        ShardCache(manifest, None, 2**30)
    assert list((tmp_path / "theirs").iterdir()) == []
