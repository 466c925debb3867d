from __future__ import annotations

import hashlib
import json
import os
import time

import numpy as np
import pytest

from clipmill import storage
from clipmill.errors import UserError
from clipmill.lease import hold
from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Sample, UnitWriter, json_bytes
from clipmill.shards.freeze import freeze
from clipmill.shards.prune import prune
from clipmill.shards.verify import verify
from clipmill.video import encode_mp4
from tests.shards.folders import write_dataset, write_parts


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "tokens"
    write_dataset(folder, tmp_path, [5, 0, 12], shard_bytes=16384)
    return folder


def shard_names(folder):
    return (folder / "shards.txt").read_text().split()


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_data_set_has_no_problems(dataset, deep):
    report = verify(str(dataset), deep)
    assert (report.problems, report.orphans) == ([], [])
    assert (report.num_units, report.num_samples) == (3, 17)
    assert report.num_shards == len(shard_names(dataset))
    assert report.num_bytes == sum((dataset / name).stat().st_size for name in shard_names(dataset))


def flip(path):
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda tar: flip(tar), "its sha256 is not the committed one"),
        (lambda tar: os.truncate(tar, 1024), "has 1024 bytes"),
        (lambda tar: tar.unlink(), "is missing"),
        (lambda tar: (tar.parent / (tar.name + ".idx")).unlink(), ".idx is missing"),
        (lambda tar: os.truncate(tar.parent / (tar.name + ".idx"), 8), "sha256 of its .idx"),
    ],
)
def test_damage_is_named_with_its_shard(dataset, damage, cause):
    name = shard_names(dataset)[1]
    damage(dataset / name)
    (problem,) = verify(str(dataset), deep=False).problems
    assert problem.startswith(f"{name}: ")
    assert cause in problem


def test_what_was_written_wrong_is_found_behind_right_hashes(tmp_path):
    url = tmp_path / "clips"
    video = encode_mp4(np.zeros((4, 16, 16, 3), np.uint8), 10.0, 20)
    writer = UnitWriter(tmp_path, "clips", 0, 2**20)
    writer.add(Sample("good", {"mp4": video, "json": json_bytes({})}))
    writer.add(Sample("bad", {"mp4": video[:50], "json": b"{", "actions.npy": b"no array", "mkv": b"none"}))
    commit_unit(str(url), 0, writer.finish(), {})
    freeze(str(url), "clips", [0], {}, {})
    assert verify(str(url), deep=False).problems == []
    problems = verify(str(url), deep=True).problems
    assert [problem.split(" cannot")[0].split(": ")[1] for problem in problems] == [
        "bad.actions.npy",
        "bad.json",
        "bad.mkv",
        "bad.mp4",
    ]


def test_a_record_whose_index_does_not_fit_the_tar_is_found(dataset):
    name = shard_names(dataset)[0]
    index = dataset / (name + ".idx")
    index.write_bytes(np.array([0, 512], "<u8").tobytes())
    for path in (dataset / "commits" / "000000.json", dataset / "manifest.json"):
        document = json.loads(path.read_text())
        for shard in document.get("parts", []) + document.get("shards", []):
            if shard["name"] == name:
                shard["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
        path.write_text(json.dumps(document))
    problems = verify(str(dataset), deep=False).problems
    assert all(problem.startswith(f"{name}: ") for problem in problems)
    assert "its index has 1 samples" in problems[0]
    assert "has data after its last sample" in problems[1]


def test_manifest_and_list_are_compared_with_the_records(dataset):
    (dataset / "shards.txt").write_text("other.tar\n")
    assert verify(str(dataset), False).problems == ["shards.txt: names other shards than the manifest"]
    (dataset / "shards.txt").unlink()
    assert verify(str(dataset), False).problems == ["shards.txt: absent"]
    (dataset / "manifest.json").unlink()
    (problem,) = verify(str(dataset), False).problems
    assert "has not finished" in problem


def test_a_lost_record_makes_no_orphans_of_what_the_manifest_names(dataset):
    (dataset / "commits" / "000000.json").unlink()
    report = verify(str(dataset), False)
    assert report.orphans == []
    assert len(report.problems) == 1
    assert "no commit record names it" in report.problems[0]


def test_a_commit_after_the_freeze_is_no_problem(dataset, tmp_path):
    commit_unit(str(dataset), 3, write_parts(tmp_path / "later", 3, 2), {})
    report = verify(str(dataset), False)
    assert (report.problems, report.orphans, report.num_samples) == ([], [], 19)


def test_orphans_are_named_and_pruned_after_the_grace_period(dataset, tmp_path):
    (part,) = write_parts(tmp_path / "killed", 7, 2)
    names = [part.name, part.name + ".idx", ".tmp-abc", "commits/.tmp-def"]
    for name in names:
        (dataset / name).write_bytes(b"left behind")
    report = verify(str(dataset), False)
    assert report.problems == []
    assert sorted(report.orphans) == sorted(names)
    assert prune(str(dataset), report.orphans, grace_seconds=3600) == []
    long_ago = time.time() - 7200
    for name in names[:3]:
        os.utime(dataset / name, (long_ago, long_ago))
    assert sorted(prune(str(dataset), report.orphans, grace_seconds=3600)) == sorted(names[:3])
    assert verify(str(dataset), False).orphans == names[3:]


def test_pruning_spares_what_has_been_committed_meanwhile(dataset, tmp_path):
    (part,) = write_parts(tmp_path / "slow", 7, 2)
    target = dataset / part.name
    target.write_bytes(part.path.read_bytes())
    report = verify(str(dataset), False)
    assert report.orphans == [part.name]
    commit_unit(str(dataset), 7, [part], {})
    os.utime(target, (0, 0))
    assert prune(str(dataset), report.orphans, grace_seconds=1) == []
    assert target.exists()


@pytest.mark.parametrize("point", ["fetch", "stat", "remove"])
def test_pruning_keeps_what_is_committed_at_any_point(dataset, tmp_path, monkeypatch, point):
    """A worker whose run lost the lease commits while pruning is at an orphan of the same name."""
    (part,) = write_parts(tmp_path / "slow", 7, 2)
    files = {part.name: part.path, part.name + ".idx": part.index_path}
    for name, path in files.items():
        (dataset / name).write_bytes(path.read_bytes())
        os.utime(dataset / name, (0, 0))
    orphans = verify(str(dataset), False).orphans
    assert sorted(orphans) == sorted(files)
    real = getattr(storage, point)

    def commit_first(url, *arguments):
        monkeypatch.setattr(storage, point, real)
        commit_unit(str(dataset), 7, [part], {})
        for name in files:
            os.utime(dataset / name, (0, 0))  # the storage's clock is no help
        return real(url, *arguments)

    monkeypatch.setattr(storage, point, commit_first)
    assert prune(str(dataset), orphans, grace_seconds=1) == []
    assert {name: (dataset / name).read_bytes() for name in files} == {
        name: path.read_bytes() for name, path in files.items()
    }
    assert verify(str(dataset), False).problems == []


def test_pruning_waits_for_no_run_and_disturbs_none(tmp_path):
    write_dataset(tmp_path / "clips" / "train", tmp_path, [1])
    (tmp_path / "clips" / "train" / "clips-000009-00-00000000.tar").write_bytes(b"left behind")
    orphans = verify(str(tmp_path / "clips" / "train"), False).orphans
    with hold(str(tmp_path / "clips"), "shard"), pytest.raises(UserError, match="is in use by shard"):
        prune(str(tmp_path / "clips" / "train"), orphans, grace_seconds=0)
    assert prune(str(tmp_path / "clips" / "train"), orphans, grace_seconds=0) == orphans


def test_a_damaged_record_costs_its_unit_and_hides_no_other(dataset):
    (dataset / "commits" / "000000.json").write_text("{")
    flip(dataset / shard_names(dataset)[-1])
    report = verify(str(dataset), False)
    assert "000000.json is damaged" in report.problems[0]
    assert report.problems[1].startswith(shard_names(dataset)[-1])
    assert (report.damaged_units, report.orphans, report.num_units) == ({0, 2}, [], 3)


def test_a_folder_without_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no data set"):
        verify(str(tmp_path), False)
