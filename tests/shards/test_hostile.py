"""Manifests and commit records that somebody else wrote: nothing in them leaves the folder of the data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipmill.errors import UserError
from clipmill.models.export import read_latest
from clipmill.shards.commits import ShardEntry, read_commit
from clipmill.shards.manifest import Manifest, make_manifest
from clipmill.training.checkpoint import Checkpoint, fetch
from tests.shards.folders import write_dataset

HASH = "0" * 64
GOOD = {"name": "clips-000000-00-00000000.tar", "bytes": 10, "sha256": HASH, "index_sha256": HASH, "samples": 1}

BAD_FIELDS = [
    ("name", "../../other.tar"),
    ("name", "/etc/passwd.tar"),
    ("name", "folder/one.tar"),
    ("name", "s3://other/one.tar"),
    ("name", "..\\one.tar"),
    ("name", ".tmp-x.tar"),
    ("name", "one.tar\n"),
    ("name", "one.zip"),
    ("name", ""),
    ("name", None),
    ("name", ["one.tar"]),
    ("sha256", "../../../../home/user/.config/evil"),
    ("sha256", HASH.upper().replace("0", "A")),
    ("sha256", HASH[1:]),
    ("sha256", HASH + "\n"),
    ("sha256", 0),
    ("index_sha256", "/" + HASH[1:]),
    ("bytes", -1),
    ("bytes", 1.5),
    ("bytes", "10"),
    ("bytes", 10**30),
    ("samples", True),
    ("samples", None),
    ("surplus", 1),
]


def write_manifest(folder: Path, entry: dict[str, Any], **changed: Any) -> str:
    """A manifest that is right but for its entry and what is changed: its fingerprint fits."""
    fields = {name: entry.get(name) for name in ShardEntry._fields}
    document: dict[str, Any] = {"kind": "clips", "recipe": {}, "facts": {}, **changed}
    try:
        made = make_manifest("", document["kind"], (ShardEntry(**fields),), document["recipe"], document["facts"])  # type: ignore[arg-type]
        fingerprint = made.fingerprint
    except TypeError:  # counts that cannot be added
        fingerprint = HASH
    folder.mkdir(exist_ok=True)
    body = {"schema": 2, "units": [0], "shards": [entry], "num_samples": 1, "fingerprint": fingerprint, **document}
    (folder / "manifest.json").write_text(json.dumps(body))
    return str(folder)


def check_refused(error: pytest.ExceptionInfo[UserError], name: str) -> None:
    assert error.match(name + " is damaged")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_right_manifest_is_read(tmp_path: Path) -> None:
    assert Manifest.load(write_manifest(tmp_path, GOOD)).shards == (ShardEntry(**GOOD),)


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_name_is_a_name_a_hash_a_hash_a_count_a_count(tmp_path: Path, field: str, value: Any) -> None:
    url = write_manifest(tmp_path, GOOD | {field: value})
    with pytest.raises(UserError) as error:
        Manifest.load(url)
    check_refused(error, "manifest.json")


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "../clips"},
        {"recipe": []},
        {"facts": None},
        {"facts": {"num_units": 10**30}},
        {"facts": {"num_units": 2**40}},
        {"facts": {"num_videos": "many"}},
        {"shards": "clips"},
        {"shards": [[]]},
        {"fingerprint": HASH},
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    url = write_manifest(tmp_path, GOOD, **changed)
    with pytest.raises(UserError) as error:
        Manifest.load(url)
    check_refused(error, "manifest.json")


@pytest.mark.parametrize("content", ["[]", "7", '{"schema": "2"}', '{"schema": true}', "[" * 100_000])
def test_what_is_no_document_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="damaged or was not written by clipmill"):
        Manifest.load(str(tmp_path))


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_commit_records_are_read_as_strictly(tmp_path: Path, field: str, value: Any) -> None:
    write_dataset(tmp_path / "tokens", tmp_path, [2])
    path = tmp_path / "tokens" / "commits" / "000000.json"
    record = json.loads(path.read_text())
    record["parts"][0][field] = value
    path.write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        read_commit(str(tmp_path / "tokens"), 0)
    check_refused(error, "000000.json")


def test_a_record_of_another_unit_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tokens", tmp_path, [2, 2])
    commits = tmp_path / "tokens" / "commits"
    (commits / "000000.json").write_bytes((commits / "000001.json").read_bytes())
    with pytest.raises(UserError, match="it is of unit 1"):
        read_commit(str(tmp_path / "tokens"), 0)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..", "a//b", "a/./b", "evil\n"])
def test_no_file_of_a_checkpoint_leaves_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "to" / "local"
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(str(tmp_path / "from"), 1, ({"name": name, "bytes": 1, "sha256": HASH},), {})
    with pytest.raises(UserError, match="is no name of a file in it"):
        fetch(checkpoint, folder)
    assert list(tmp_path.rglob("evil*")) == []


@pytest.mark.parametrize("sha8", ["../../other", "0123456", 7, None])
def test_the_newest_export_is_one_of_its_folder(tmp_path: Path, sha8: Any) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "latest.json").write_text(json.dumps({"schema": 1, "sha8": sha8}))
    with pytest.raises(UserError, match="names no export"):
        read_latest(str(tmp_path))
