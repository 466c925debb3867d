from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards import cache as shard_cache
from clipmill.shards.commits import commit_unit
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes, eval_batches, train_batches
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze
from clipmill.shards.order import Order, num_streams
from clipmill.video import encode_mp4
from tests.shards.folders import KEYS, flip, write_dataset


@pytest.fixture
def dataset(manifest, tmp_path):
    return ShardDataset(manifest, decode_codes, tmp_path / "cache")


def take(dataset, num_steps, *, first_step=0, global_batch=8, **changes):
    order = Order(dataset.manifest.counts, 3, num_streams(global_batch), 4)
    arguments = {"micro_batch": None, "rank": 0, "world_size": 1, "num_workers": 0, **changes}
    batches = train_batches(dataset, order, global_batch=global_batch, first_step=first_step, **arguments)
    return list(itertools.islice(batches, num_steps))


def keys_of(batch):
    return [key for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True) if weight]


def assert_equal(one, other):
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            assert (a["key"], a["label"]) == (b["key"], b["label"])
            for field in ("codes", "actions", "weight"):
                torch.testing.assert_close(a[field], b[field], rtol=0, atol=0)


def test_stored_order(dataset):
    assert len(dataset) == 29
    assert [dataset[index]["key"] for index in range(29)] == KEYS
    assert dataset.read(2, 1)["key"] == f"{3:016x}_{1:06d}"  # a unit without samples has no shard
    for index in (-1, 29):
        with pytest.raises(IndexError):
            dataset[index]


def test_batches_hold_tensors_and_lists(dataset):
    ((batch,),) = take(dataset, 1)
    assert batch["codes"].dtype == torch.int64
    assert batch["codes"].shape == (8, 3, 2, 2)
    assert batch["actions"].dtype == torch.float32
    assert batch["actions"].shape == (8, 3, 2)
    assert batch["weight"].tolist() == [1.0] * 8
    assert set(batch["label"]) <= {"class0", "class1", None}
    for key, codes, actions in zip(batch["key"], batch["codes"], batch["actions"], strict=True):
        video, clip = int(key[:16], 16), int(key[17:])
        assert codes[0, 0].tolist() == [video, clip]
        assert actions[0, 0] == video


def test_an_epoch_serves_each_sample_once(dataset):
    batches = take(dataset, 29, global_batch=4)
    served = [key for (batch,) in batches for key in batch["key"]]
    assert sorted(served) == sorted(KEYS * 4)


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 8])
def test_world_sizes_and_micro_batches_do_not_change_a_step(dataset, micro_batch):
    whole = take(dataset, 5)
    for world_size in (1, 2, 3, 4, 6, 8, 16):
        ranks = [take(dataset, 5, micro_batch=micro_batch, rank=r, world_size=world_size) for r in range(world_size)]
        for step, (batch,) in enumerate(whole):
            micro_batches = [micro for rank in ranks for micro in rank[step]]
            assert [key for micro in micro_batches for key in keys_of(micro)] == batch["key"]
            assert sum(micro["weight"].sum() for micro in micro_batches) == 8
            assert len({len(rank[step]) for rank in ranks}) == 1
            assert len({len(micro["key"]) for micro in micro_batches}) == 1
            assert len(micro_batches[0]["key"]) <= (micro_batch or 8)


def test_resume_at_any_step_is_a_suffix(dataset):
    undisturbed = take(dataset, 12)
    for step in (1, 5, 11):
        assert_equal(take(dataset, 12 - step, first_step=step), undisturbed[step:])


def test_the_number_of_workers_changes_nothing(dataset):
    alone = take(dataset, 7, micro_batch=3)
    for num_workers in (1, 2):
        assert_equal(take(dataset, 7, micro_batch=3, num_workers=num_workers), alone)


TRAINER = """\
import signal, sys
from pathlib import Path
from clipmill.shards.dataset import ShardDataset, decode_codes, train_batches
from clipmill.shards.manifest import Manifest
from clipmill.shards.order import Order, num_streams

if __name__ == "__main__":
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    dataset = ShardDataset(Manifest.load(sys.argv[1], "tokens"), decode_codes, Path(sys.argv[2]))
    order = Order(dataset.manifest.counts, 3, num_streams(8), 4)
    batches = train_batches(
        dataset, order, global_batch=8, micro_batch=None, rank=0, world_size=1, first_step=0, num_workers=2
    )
    next(batches)
    print("at work", flush=True)
    while not stopped:
        next(batches)
    for _ in range(20):  # more than the workers have ready
        next(batches)
    print("checkpoint", flush=True)
    if sys.argv[3] == "error":
        raise RuntimeError("an error keeps the frames, and so the loader, alive")
    if sys.argv[3] == "kill":
        signal.raise_signal(signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["return", "error", "kill"])
def test_workers_outlive_a_signal_to_their_group_but_not_the_training(manifest, tmp_path, end):
    (script := tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, str(script), manifest.url, str(tmp_path / "cache"), end]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as trainer:
        assert trainer.stdout is not None
        try:
            assert trainer.stdout.readline() == "at work\n"
            workers = psutil.Process(trainer.pid).children(recursive=True)
            assert len(workers) >= 2
            os.killpg(trainer.pid, signal.SIGTERM)
            assert trainer.stdout.readline() == "checkpoint\n"
            assert trainer.wait(timeout=60) == {"return": 0, "error": 1, "kill": -signal.SIGKILL}[end]
            deadline = time.monotonic() + 60
            while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in workers):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(trainer.pid, signal.SIGKILL)


def test_loading_leaves_the_global_generator_alone(dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(dataset, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "max_samples"), [(1, None), (2, None), (3, 10), (4, 3), (1, 1000), (8, 1)])
def test_evaluation_reads_in_order_and_once(dataset, world_size, max_samples):
    ranks = [
        list(eval_batches(dataset, batch_size=4, rank=rank, world_size=world_size, max_samples=max_samples))
        for rank in range(world_size)
    ]
    assert [key for rank in ranks for batch in rank for key in keys_of(batch)] == KEYS[:max_samples]
    assert len({len(rank) for rank in ranks}) == 1
    assert len({len(batch["key"]) for rank in ranks for batch in rank}) == 1
    assert len(ranks[0][0]["key"]) <= 4


def test_a_limited_evaluation_sees_many_videos_out_of_few_shards(manifest):
    told = dataclasses.replace(manifest, facts={**manifest.facts, "num_videos": 4})  # about 7 clips each
    for max_samples, expected in ((2, [0, 7]), (3, [0, 7, 14]), (8, [0, 3, 7, 10, 14, 18, 21, 25])):
        batches = eval_batches(
            ShardDataset(told, decode_codes), batch_size=4, rank=0, world_size=1, max_samples=max_samples
        )
        assert [key for batch in batches for key in keys_of(batch)] == [KEYS[number] for number in expected]


def test_evaluation_of_nothing_yields_nothing(dataset, tmp_path):
    empty = ShardDataset(write_dataset(tmp_path / "empty", tmp_path / "none", [0]), decode_codes, tmp_path / "cache")
    assert list(eval_batches(empty, batch_size=4, rank=0, world_size=1)) == []
    assert list(eval_batches(dataset, batch_size=4, rank=0, world_size=1, max_samples=0)) == []


@pytest.mark.parametrize("member", ["mp4", "npy"])
def test_clips(tmp_path, member):
    frames = np.random.default_rng(0).integers(0, 255, (4, 1, 1, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    content = encode_mp4(frames, 10.0, 10) if member == "mp4" else npy_bytes(frames)
    writer = UnitWriter(tmp_path, "clips", 0, 2**20)
    writer.add(Sample("clip", {member: content, "json": json_bytes({"label": "a", "fps": 10.0})}))
    commit_unit(str(tmp_path / "clips"), 0, writer.finish(), {})
    clips = ShardDataset(freeze(str(tmp_path / "clips"), "clips", [0], {}, {}), decode_clip, tmp_path / "cache")
    clip = clips[0]
    assert (clip["label"], clip["meta"]["fps"], clip["key"]) == ("a", 10.0, "clip")
    assert clip["video"].dtype == np.uint8
    assert np.abs(clip["video"].astype(int) - frames).max() <= (0 if member == "npy" else 40)
    assert "actions" not in clip


# ------------------------------------------------------------------------------------- verified access


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (flip, "has sha256"),
        (lambda tar: os.truncate(tar, 1024), "has 1024 bytes"),
        (lambda tar: tar.unlink(), "does not exist"),
        (lambda tar: flip(tar.with_name(tar.name + ".idx")), ".idx does not have the sha256"),
        (lambda tar: tar.with_name(tar.name + ".idx").unlink(), ".idx does not exist"),
        (lambda tar: tar.write_bytes(sorted(tar.parent.glob("*.tar"))[-1].read_bytes()), "the manifest says"),
    ],
)
@pytest.mark.parametrize("known", ["never", "to an earlier run", "to this run, which has it open"])
def test_a_damaged_shard_serves_no_sample(manifest, tmp_path, damage, cause, known):
    if known.endswith("open") and ".idx" in cause:
        pytest.skip("an open shard has its index in memory")
    dataset = ShardDataset(manifest, decode_codes, tmp_path / "cache")
    if known != "never":
        dataset.read(1, 0)
    if known == "to an earlier run":
        dataset = ShardDataset(manifest, decode_codes, tmp_path / "cache")
    name = manifest.shards[1].name
    damage(storage.local_path(manifest.url) / name)
    with pytest.raises(UserError, match=cause) as caught:
        dataset.read(1, 1)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert dataset.read(0, 0)["key"] == KEYS[0]


@pytest.mark.parametrize("suffixes", [[""], ["", ".idx"]])
@pytest.mark.parametrize("is_open", [False, True])
def test_two_shards_of_one_size_that_changed_places_serve_no_sample(tmp_path, suffixes, is_open):
    manifest = write_dataset(tmp_path / "tokens", tmp_path, [6, 6])
    assert manifest.shards[0].bytes == manifest.shards[1].bytes
    dataset = ShardDataset(manifest, decode_codes, tmp_path / "cache")
    if is_open:
        assert [dataset.read(shard, 0)["key"] for shard in (0, 1)] == [
            "0000000000000000_000000",
            "0000000000000001_000000",
        ]
    one, other = (storage.local_path(manifest.url) / shard.name for shard in manifest.shards)
    for suffix in suffixes:
        paths = [path.with_name(path.name + suffix) for path in (one, other, tmp_path / "aside")]
        for source, target in ((0, 2), (1, 0), (2, 1)):
            paths[source].rename(paths[target])
    for shard in (0, 1):
        with pytest.raises(UserError, match=f"shard {manifest.shards[shard].name} .* has sha256"):
            dataset.read(shard, 1)


def test_a_shard_that_was_replaced_by_its_copy_is_read_on(manifest, dataset):
    dataset.read(1, 0)
    path = storage.local_path(manifest.url) / manifest.shards[1].name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert dataset.read(1, 1)["key"] == f"{2:016x}_{1:06d}"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_worker_s_damage_arrives_as_one_line(manifest, tmp_path, num_workers):
    for shard in manifest.shards:
        flip(storage.local_path(manifest.url) / shard.name)
    dataset = ShardDataset(manifest, decode_codes, tmp_path / "cache")
    with pytest.raises(UserError, match="has sha256") as caught:
        take(dataset, 1, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_a_verified_shard_is_hashed_once_for_all_processes(manifest, tmp_path, monkeypatch):
    hashed = []
    digest = shard_cache.hashlib.file_digest
    monkeypatch.setattr(
        shard_cache.hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name)
    )
    for _ in range(3):
        dataset = pickle.loads(pickle.dumps(ShardDataset(manifest, decode_codes, tmp_path / "cache")))
        for index in range(len(dataset)):
            dataset[index]
    assert len(hashed) == len(manifest.shards)


def test_without_a_writable_cache_local_data_is_still_verified(manifest, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    dataset = ShardDataset(manifest, decode_codes, tmp_path / "file" / "cache")
    assert [dataset[index]["key"] for index in range(29)] == KEYS
    flip(storage.local_path(manifest.url) / manifest.shards[0].name)
    with pytest.raises(UserError, match="has sha256"):
        ShardDataset(manifest, decode_codes, tmp_path / "file" / "cache")[0]


def test_open_shards_are_bounded_and_their_views_stay_readable(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "MAX_OPEN_SHARDS", 2)
    cache = shard_cache.ShardCache(manifest, tmp_path / "cache", 2**30)
    first = cache.open(0)
    before = bytes(first.view)
    for shard in (1, 2, 3):
        cache.open(shard)
    assert len(cache._open) == 2
    assert bytes(first.view) == before
