"""Data sets in a bucket are read through the cache."""

from __future__ import annotations

import os

import pytest

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.dataset import ShardDataset, decode_codes
from clipmill.shards.manifest import Manifest
from tests.shards.folders import KEYS, flip


@pytest.fixture
def remote(manifest):
    """The same data set as a bucket of fsspec's memory file system, which belongs to this process."""
    import fsspec

    memory = fsspec.filesystem("memory")
    folder = storage.local_path(manifest.url)
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/tokens/{path.relative_to(folder)}", path.read_bytes())
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_bucket_is_read_through_the_cache(remote, manifest, tmp_path):
    loaded = Manifest.load("memory://bucket/tokens", "tokens")
    assert loaded.fingerprint == manifest.fingerprint
    dataset = ShardDataset(loaded, decode_codes, tmp_path / "cache")
    assert [dataset[index]["key"] for index in range(29)] == KEYS
    remote.rm("/bucket/tokens", recursive=True)
    again = ShardDataset(loaded, decode_codes, tmp_path / "cache")
    assert [again[index]["key"] for index in range(29)] == KEYS
    remote.pipe_file("/bucket/x", b"")  # the fixture removes the bucket


def test_a_damaged_download_is_never_served_or_kept(remote, manifest, tmp_path):
    name = manifest.shards[0].name
    content = remote.cat_file(f"/bucket/tokens/{name}")
    remote.pipe_file(f"/bucket/tokens/{name}", content[:600] + b"?" + content[601:])
    loaded = Manifest.load("memory://bucket/tokens", "tokens")
    with pytest.raises(UserError, match=f"{name} of memory://bucket/tokens: .* has sha256"):
        ShardDataset(loaded, decode_codes, tmp_path / "cache")[0]
    remote.pipe_file(f"/bucket/tokens/{name}", content)
    assert ShardDataset(loaded, decode_codes, tmp_path / "cache")[0]["key"] == KEYS[0]
    remote.rm(f"/bucket/tokens/{manifest.shards[1].name}")
    with pytest.raises(UserError, match=f"{manifest.shards[1].name} .*does not exist"):
        ShardDataset(loaded, decode_codes, tmp_path / "cache").read(1, 0)


def test_a_cached_file_that_was_damaged_is_downloaded_again(remote, tmp_path):
    loaded = Manifest.load("memory://bucket/tokens", "tokens")
    ShardDataset(loaded, decode_codes, tmp_path / "cache")[0]
    (cached,) = (tmp_path / "cache" / "shards").glob("*.tar")
    for damage in (flip, lambda path: os.truncate(path, 700), lambda path: path.with_name(path.name + ".idx").unlink()):
        damage(cached)
        assert ShardDataset(loaded, decode_codes, tmp_path / "cache")[0]["key"] == KEYS[0]


def test_the_cache_keeps_to_its_budget_by_least_recent_use(remote, manifest, tmp_path):
    sizes = [shard.bytes for shard in manifest.shards]
    loaded = Manifest.load("memory://bucket/tokens", "tokens")
    budget = sizes[0] + sizes[1] + sizes[2]
    cache = tmp_path / "cache"

    def cached():
        names = {path.stem for path in (cache / "shards").glob("*.tar")}
        return [number for number, shard in enumerate(manifest.shards) if shard.sha256 in names]

    first = ShardDataset(loaded, decode_codes, cache, budget)
    for shard in (0, 1, 2):
        first.read(shard, 0)
    assert cached() == [0, 1, 2]
    ShardDataset(loaded, decode_codes, cache, budget).read(0, 0)  # now shard 1 is the one used longest ago
    first.read(3, 0)
    assert 0 in cached()
    assert 3 in cached()
    assert 1 not in cached()
    assert sum(path.stat().st_size for path in (cache / "shards").glob("*.tar")) <= budget
    assert first.read(1, 0)["key"] == f"{2:016x}_{0:06d}"  # unlinked, but still mapped
    ShardDataset(loaded, decode_codes, cache, cache_bytes=1).read(2, 0)
    assert 2 in cached()
