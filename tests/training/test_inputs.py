"""What a training checks and tells before its first step."""

from __future__ import annotations

import logging
import shutil

import fsspec
import numpy as np
import pytest

from clipmill import storage
from clipmill.config import RunConfig, TrainingConfig
from clipmill.errors import UserError
from clipmill.shards.dataset import MixedDataset, ShardDataset, decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.training import vqvae
from clipmill.training.inputs import check_cache, describe_batches
from tests.shards.folders import write_dataset


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "tokens", tmp_path, [5, 4, 12])


def test_a_cache_smaller_than_the_order_needs_is_refused_with_the_numbers(manifest, tmp_path):
    memory = fsspec.filesystem("memory")
    folder = storage.local_path(manifest.url)
    for path in folder.glob("*.*"):
        memory.pipe_file(f"/inputs/tokens/{path.name}", path.read_bytes())
    needed = sum(shard.bytes for shard in manifest.shards)  # 32 streams: all of it
    try:
        remote = ShardDataset(Manifest.load("memory://inputs/tokens"), decode_codes, tmp_path / "cache")
        check_cache(remote, TrainingConfig(cache_bytes=needed), world_size=1, local_size=1)
        with pytest.raises(UserError, match=f"cache_bytes {needed - 1:,} is too small .* need {needed:,}; raise"):
            check_cache(remote, TrainingConfig(cache_bytes=needed - 1), world_size=1, local_size=1)
    finally:
        memory.rm("/inputs", recursive=True)
    local = ShardDataset(manifest, decode_codes, tmp_path / "cache")
    check_cache(local, TrainingConfig(cache_bytes=1), world_size=1, local_size=1)


def test_padding_and_same_video_pairs_are_logged(manifest, tmp_path, caplog):
    dataset = ShardDataset(manifest, decode_codes, tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        describe_batches(dataset, TrainingConfig(global_batch=8), world_size=3)
        assert "1 of 9 rows a step only fill up" in caplog.text
        caplog.clear()
        manifest.facts["num_videos"] = 3
        describe_batches(dataset, TrainingConfig(global_batch=128, shuffle_window=64), world_size=4)
    assert "fill up" not in caplog.text
    assert f"has on average {64 * 6 / 63:.3g} pairs" in caplog.text  # 64 streams with one pair each, 7 clips a video


def test_a_mix_needs_the_cache_that_all_its_downloads_need(manifest, tmp_path):
    memory = fsspec.filesystem("memory")
    folder = storage.local_path(manifest.url)
    for path in folder.glob("*.*"):
        memory.pipe_file(f"/inputs/tokens/{path.name}", path.read_bytes())
    needed = 2 * sum(shard.bytes for shard in manifest.shards)
    try:
        remote = [ShardDataset(Manifest.load("memory://inputs/tokens"), decode_codes, tmp_path) for _ in range(2)]
        local = ShardDataset(manifest, decode_codes, tmp_path)
        mixed = MixedDataset([*remote, local], np.array([400, 300, 300]))
        check_cache(mixed, TrainingConfig(cache_bytes=needed), world_size=1, local_size=1)
        with pytest.raises(UserError, match=f"need {needed:,}; raise"):
            check_cache(mixed, TrainingConfig(cache_bytes=needed - 1), world_size=1, local_size=1)
    finally:
        memory.rm("/inputs", recursive=True)


def test_the_pairs_of_each_data_set_in_a_mix_are_logged(manifest, tmp_path, caplog):
    manifest.facts["num_videos"] = 3
    mixed = MixedDataset([ShardDataset(manifest, decode_codes, tmp_path)] * 2, np.array([250, 750]))
    with caplog.at_level(logging.INFO):
        describe_batches(mixed, TrainingConfig(global_batch=256, shuffle_window=64), world_size=4)
    (line,) = [record.message for record in caplog.records]  # the first has one row a stream, so no pairs
    assert (
        f"a batch of 192 clips has on average {64 * 3 * 6 / 63:.3g} pairs" in line
    )  # 64 streams with three pairs each


def test_clips_of_one_colour_are_refused_before_the_training(workspace, tmp_path):
    shutil.copytree(workspace / "root" / "clips", tmp_path / "clips")
    document = tmp_path / "clips" / "train" / "manifest.json"
    document.write_text(document.read_text().replace('"pixel_variance": 0.08', '"pixel_variance": 0.0'))
    config = RunConfig(root=str(tmp_path))
    with pytest.raises(UserError, match=r"all pixels of the clips at .*train have one colour, .*reject_black=10"):
        vqvae._clips(config)
