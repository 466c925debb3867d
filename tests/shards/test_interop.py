from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipmill.shards.format import read_index
from clipmill.shards.interop import publish_energon
from clipmill.shards.manifest import Manifest
from tests.shards.folders import write_dataset


@pytest.fixture
def splits(tmp_path: Path) -> dict[str, Manifest]:
    splits = {}
    for split, counts in {"train": [5, 0, 3], "val": [2]}.items():
        (tmp_path / "scratch" / split).mkdir(parents=True)
        splits[split] = write_dataset(tmp_path / "set" / split, tmp_path / "scratch" / split, counts)
    publish_energon(str(tmp_path / "set"), splits)
    return splits


def test_the_shard_list_of_wids(splits: dict[str, Manifest], tmp_path: Path) -> None:
    document = json.loads((tmp_path / "set" / "train" / "wids.json").read_text())
    assert (document["__kind__"], document["wids_version"]) == ("wids-shard-index-v1", 1)
    assert sum(shard["nsamples"] for shard in document["shardlist"]) == 8
    for shard in document["shardlist"]:
        assert (tmp_path / "set" / "train" / shard["url"]).stat().st_size == shard["filesize"]


def test_energon_finds_every_shard_with_its_count(splits: dict[str, Manifest], tmp_path: Path) -> None:
    meta = tmp_path / "set" / ".nv-meta"
    counts = json.loads((meta / ".info.json").read_text())["shard_counts"]
    parts = yaml.safe_load((meta / "split.yaml").read_text())
    assert parts["exclude"] == []
    assert {name for names in parts["split_parts"].values() for name in names} == counts.keys()
    assert [sum(counts[name] for name in parts["split_parts"][split]) for split in ("train", "val")] == [8, 2]
    for name, count in counts.items():
        tar = tmp_path / "set" / name
        assert len(read_index(tar.with_name(tar.name + ".idx").read_bytes())) - 1 == count


def test_writing_again_touches_nothing(splits: dict[str, Manifest], tmp_path: Path) -> None:
    meta = tmp_path / "set" / ".nv-meta"
    before = {path: path.stat().st_mtime_ns for path in meta.iterdir()}
    publish_energon(str(tmp_path / "set"), splits)
    assert {path: path.stat().st_mtime_ns for path in meta.iterdir()} == before


@pytest.mark.slow
def test_energon_s_own_reader_reads_all_samples(splits: dict[str, Manifest], tmp_path: Path) -> None:
    energon = pytest.importorskip("megatron.energon")
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)

    @energon.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**energon.basic_sample_keys(sample), "members": set(sample)}

    class Keys(energon.DefaultTaskEncoder):  # type: ignore[misc, name-defined]
        cookers = (energon.Cooker(cook),)

    dataset = energon.get_val_dataset(
        str(tmp_path / "set"), split_part="train", batch_size=None, worker_config=workers, task_encoder=Keys()
    )
    samples = list(energon.get_loader(dataset))
    assert len(samples) == len({sample["__key__"] for sample in samples}) == 8
    assert all({"codes.npy", "json"} <= sample["members"] for sample in samples)
