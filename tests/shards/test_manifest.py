from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import webdataset

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.commits import commit_unit, committed_units, read_commit
from clipmill.shards.format import Sample, UnitWriter, json_bytes, parse_npy
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest
from tests.shards.folders import write_dataset, write_parts


def snapshot(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "tokens"
    write_dataset(folder, tmp_path, [5, 0, 12, 3], shard_bytes=16384)
    return folder


def test_a_manifest_names_all_shards_in_order_of_units(dataset):
    manifest = Manifest.load(str(dataset), "tokens")
    assert manifest.num_samples == manifest.counts.sum() == 20
    assert manifest.counts.dtype == np.int64
    assert [shard.name for shard in manifest.shards] == sorted(shard.name for shard in manifest.shards)
    assert (dataset / "shards.txt").read_text().splitlines() == [shard.name for shard in manifest.shards]
    assert committed_units(str(dataset)) == [0, 1, 2, 3]
    assert manifest.recipe == {"num_codes": 64, "latent_shape": [3, 2, 2]}
    assert pickle.loads(pickle.dumps(manifest)) == manifest


def test_webdataset_reads_shards_txt(dataset):
    urls = [str(dataset / name) for name in (dataset / "shards.txt").read_text().split()]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 20
    assert samples[0]["__key__"] == f"{0:016x}_{0:06d}"
    assert samples[-1]["codes.npy"][0, 0].tolist() == [3, 2]
    assert samples[-1]["json"]["video"] == f"{3:016x}"
    assert samples[-1]["actions.npy"].dtype == np.float32


def test_commit_records_hold_parts_and_the_stage_s_own_keys(dataset):
    record = read_commit(str(dataset), 2)
    assert record["unit"] == 2
    assert record["exclusions"] == []
    assert [set(part) for part in record["parts"]] == [
        {"name", "bytes", "sha256", "index_sha256", "samples"} for _ in record["parts"]
    ]
    assert sum(part["samples"] for part in record["parts"]) == 12
    assert read_commit(str(dataset), 1)["parts"] == []
    with pytest.raises(FileNotFoundError):
        read_commit(str(dataset), 4)
    with pytest.raises(ValueError, match="parts"):
        commit_unit(str(dataset), 4, [], {"parts": []})


def test_freezing_again_changes_nothing(dataset, tmp_path):
    before = snapshot(dataset)
    first = Manifest.load(str(dataset), "tokens")
    assert write_dataset(dataset, tmp_path / "again", [5, 0, 12, 3], shard_bytes=16384) == first
    assert snapshot(dataset) == before


def test_a_data_set_is_byte_identical_wherever_and_whenever_it_is_written(dataset, tmp_path):
    other = tmp_path / "other"
    write_dataset(other, tmp_path / "again", [5, 0, 12, 3], shard_bytes=16384)
    assert contents(other) == contents(dataset)


def test_a_copied_folder_is_the_same_data_set(dataset, tmp_path):
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(dataset, copy)
    original, copied = Manifest.load(str(dataset), "tokens"), Manifest.load(str(copy), "tokens")
    assert copied.fingerprint == original.fingerprint
    assert copied.url != original.url


def test_the_fingerprint_covers_recipe_and_shards_but_no_facts(dataset, tmp_path):
    url = str(dataset)
    fingerprint = Manifest.load(url, "tokens").fingerprint
    recipe = {"num_codes": 64, "latent_shape": (3, 2, 2)}
    assert freeze(url, "tokens", range(4), recipe, {"classes": ["new"]}).fingerprint == fingerprint
    assert freeze(url, "tokens", range(4), {**recipe, "num_codes": 65}, {}).fingerprint != fingerprint
    assert freeze(url, "tokens", range(3), recipe, {}).fingerprint != fingerprint
    assert freeze(url, "clips", range(4), recipe, {}).fingerprint != fingerprint


def test_freezing_needs_every_unit(dataset):
    with pytest.raises(FileNotFoundError):
        freeze(str(dataset), "tokens", range(5), {}, {})


def test_an_unfinished_data_set_has_no_manifest(tmp_path):
    commit_unit(str(tmp_path / "tokens"), 0, write_parts(tmp_path / "scratch", 0, 2), {})
    with pytest.raises(FileNotFoundError):
        Manifest.load(str(tmp_path / "tokens"), "tokens")


def test_what_this_version_cannot_trust_is_refused(dataset):
    url, path = str(dataset), dataset / "manifest.json"
    with pytest.raises(UserError, match="holds tokens, not clips"):
        Manifest.load(url, "clips")
    document = json.loads(path.read_text())
    for change, message in [
        ({"schema": 3}, "schema 3"),
        ({"num_codes": 1, "recipe": {"num_codes": 1}}, "damaged"),
        ({"shards": document["shards"][1:]}, "damaged"),
        ({"shards": [{**document["shards"][0], "samples": 6}, *document["shards"][1:]]}, "damaged"),
        ({"shards": [{"name": "x"}]}, "damaged"),
    ]:
        path.write_text(json.dumps({**document, **change}))
        with pytest.raises(UserError, match=message):
            Manifest.load(url, "tokens")


def _commit_own_version(url, scratch, writer_number, ready, results):
    """One of several writers of unit 0, each with samples of its own."""
    writer = UnitWriter(scratch, "tokens", 0, 2**20)
    for clip in range(3):
        writer.add(Sample(f"clip_{clip}", {"json": json_bytes({"writer": writer_number})}))
    parts = writer.finish()
    ready.wait()
    record = commit_unit(url, 0, parts, {"writer": writer_number})
    results.put((writer_number, parts[0].name, record))


def test_of_several_writers_of_a_unit_one_wins_with_whole_objects(tmp_path):
    url = str(tmp_path / "tokens")
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    processes = []
    for number in range(2):
        scratch = tmp_path / f"writer{number}"
        scratch.mkdir()
        process = context.Process(target=_commit_own_version, args=(url, scratch, number, ready, results))
        process.start()
        processes.append(process)
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    record = read_commit(url, 0)
    assert [answer[2] for answer in answers] == [record, record]
    (winner_part,) = [name for number, name, _ in answers if number == record["writer"]]
    assert [part["name"] for part in record["parts"]] == [winner_part]
    manifest = freeze(url, "tokens", [0], {}, {})
    samples = list(webdataset.WebDataset(storage.join(url, manifest.shards[0].name), shardshuffle=False).decode())
    assert {sample["json"]["writer"] for sample in samples} == {record["writer"]}


def test_the_first_record_stays(tmp_path):
    url = str(tmp_path / "tokens")
    first = commit_unit(url, 0, write_parts(tmp_path / "first", 0, 2), {"note": "first"})
    assert commit_unit(url, 0, write_parts(tmp_path / "second", 0, 3), {"note": "second"}) == first
    assert [entry.name for entry in storage.list_folder(url)] == [
        name for part in first["parts"] for name in (part["name"], part["name"] + ".idx")
    ]


def test_actions_and_codes_are_readable_without_webdataset(dataset):
    """An example of the format for other readers: offsets, then plain tar members."""
    import tarfile

    with tarfile.open(dataset / (dataset / "shards.txt").read_text().split()[0]) as tar:
        names = tar.getnames()
        codes = parse_npy(tar.extractfile(names[1]).read())
    assert names[:3] == [f"{0:016x}_{0:06d}.{member}" for member in ("actions.npy", "codes.npy", "json")]
    assert codes.shape == (3, 2, 2)
