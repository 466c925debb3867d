"""What people and full disks do to a training folder costs no good checkpoint."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipmill import storage
from clipmill.errors import DiskUnusable, UserError
from clipmill.metrics import MetricsLog, read_metrics
from clipmill.training import saver as saver_module
from clipmill.training.checkpoint import attempt_url, list_checkpoints, newest, prune, remove_leftovers
from clipmill.training.saver import Saver
from tests.training.test_checkpoint import Lonely, TinyEngine, commit


def saver_of(folder: Path, attempt: str = "000001-0000") -> Saver:
    return Saver(Lonely(), str(folder), attempt, None, {}, keep_last=1, keep_every=None)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in storage.walk(str(folder / "checkpoints")))


def test_folders_of_other_names_are_neither_resumed_from_nor_removed(tmp_path: Path) -> None:
    url = Path(commit(tmp_path, 4, "000001-0000", {"x": b"x"}))
    step = url.parent
    for copy in ("step-00000004-backup", "step-00000004.bad", "best", "step-4", "step-00000009", "step-000000001"):
        shutil.copytree(step, step.with_name(copy))
    shutil.copytree(url, url.with_name("000001-0000.bak"))
    (step.parent / "notes.txt").touch()
    foreign = {name for name in names(tmp_path) if not name.startswith("step-00000004/000001-0000/")}
    found = newest(str(tmp_path))
    assert found is not None
    assert (found.step, found.url) == (4, str(url))
    commit(tmp_path, 12, "000001-0000", {"x": b"x"})
    prune(str(tmp_path), keep_last=1, keep_every=None, lease=None)
    remove_leftovers(str(tmp_path), "000009-0000", None)
    own = {f"step-00000012/000001-0000/{name}" for name in ("COMMITTED", "x")}
    assert set(names(tmp_path)) == foreign | own


def test_ruined_checkpoints_of_older_versions_are_not_resumed_from(tmp_path: Path) -> None:
    commit(tmp_path, 4, "000001-0000", {"x": b"x"})
    ruined = Path(commit(tmp_path, 8, "000001-0000", {"x": b"x"})) / "COMMITTED"
    document = json.loads(ruined.read_text())
    ruined.write_text(json.dumps(document | {"state": {"probe_loss": math.nan}}))
    assert [one.step for one in list_checkpoints(str(tmp_path))] == [4]


def test_a_failed_upload_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_file = storage.publish_file

    def publish(path: Path, url: str) -> None:
        publish_file(path, url)
        raise OSError(errno.ENOSPC, "No space left on device", url)

    saver = saver_of(tmp_path)
    assert saver.save(TinyEngine(), 1, {}, is_last=False)  # type: ignore[arg-type]
    saver.finish()
    monkeypatch.setattr(storage, "publish_file", publish)
    saver.save(TinyEngine(), 2, {}, is_last=False)  # type: ignore[arg-type]
    saver.join()
    assert {name.partition("/")[0] for name in names(tmp_path)} == {"step-00000001"}
    monkeypatch.undo()
    saver.save(TinyEngine(), 3, {}, is_last=True)  # type: ignore[arg-type]
    assert [one.step for one in list_checkpoints(str(tmp_path))] == [3]


def test_what_a_killed_writer_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    for attempt in ("000001-0000", "000003-0000"):
        storage.publish_bytes(storage.join(attempt_url(str(tmp_path), 4, attempt), "x"), b"partial")
    commit(tmp_path, 2, "000001-0000", {"x": b"x"})
    saver_of(tmp_path, "000002-0000")
    assert {name.rpartition("/")[0] for name in names(tmp_path)} == {
        "step-00000002/000001-0000",
        "step-00000004/000003-0000",
    }


@pytest.mark.parametrize(
    ("total", "free", "kind", "line"),
    [
        (5, 5, UserError, "has 0.0 MB in all, and a checkpoint needs .* set TMPDIR to a folder on a larger disk"),
        (100, 5, DiskUnusable, "has 0.0 MB free, and a checkpoint needs .*; free some, or set TMPDIR"),
    ],
)
def test_a_staging_disk_that_is_too_small_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, kind: type[Exception], line: str
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(total=total, free=free)
    monkeypatch.setattr(saver_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(kind, match=line) as caught:
        saver_of(tmp_path).save(TinyEngine(), 1, {}, is_last=True)  # type: ignore[arg-type]
    assert isinstance(caught.value, OSError) == (kind is DiskUnusable)


def test_a_staging_disk_that_fills_up_costs_one_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(TinyEngine):
        def save(self, folder: Path, on_written: Callable[[], object]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "weights.pt"))

    saver = saver_of(tmp_path)
    assert not saver.save(Full(), 1, {}, is_last=False)  # type: ignore[arg-type]
    assert "a checkpoint is lost: the disk of " in caplog.text
    assert saver.save(TinyEngine(), 2, {}, is_last=True)  # type: ignore[arg-type]
    assert [one.step for one in list_checkpoints(str(tmp_path))] == [2]
    for step in (3, 4):
        saver.save(Full(), step, {}, is_last=False)  # type: ignore[arg-type]
    with pytest.raises(DiskUnusable, match=r"weights\.pt is full .* a checkpoint needs 0\.0 MB"):
        saver.save(Full(), 5, {}, is_last=False)  # type: ignore[arg-type]


def test_documents_are_valid_json(tmp_path: Path) -> None:
    url = str(tmp_path / "document.json")
    storage.publish_document(url, {"loss": math.nan, "list": [math.inf, 1.5], "deep": {"x": -math.inf}}, 1)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document: dict[str, Any] = json.loads((tmp_path / "document.json").read_text(), parse_constant=refuse)
    assert document == {"schema": 1, "loss": None, "list": [None, 1.5], "deep": {"x": None}}


def test_foreign_files_in_metrics_do_no_harm(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), "000001-0000")
    log.write({"step": 1, "split": "train", "loss": 2.0})
    log.upload()
    log.close()
    folder = tmp_path / "metrics"
    own = (folder / "000001-0000.jsonl").read_text()
    (folder / "000001-0000 (copy).jsonl").write_text(own.replace("2.0", "9.0"))
    (folder / "notes.jsonl").write_text("not json\n")
    (folder / "000002-0000.jsonl").write_text('{"a": 1}\n[]\n\x00\n')
    (folder / "000003-0000.jsonl").mkdir()
    assert [record["loss"] for record in read_metrics(str(tmp_path))] == [2.0]
