from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from clipmill import storage
from clipmill.errors import StorageUnavailable, UserError
from clipmill.training.checkpoint import SCHEMA, fetch, list_checkpoints, prune
from clipmill.training.saver import MOST_FAILED_IN_A_ROW, Saver
from clipmill.training.world import World
from clipmill.training.zero.partitions import owner


def commit(root: Path, step: int, attempt: str, contents: dict[str, bytes]) -> str:
    """A committed checkpoint as `save` leaves it."""
    url = str(root / "checkpoints" / f"step-{step:08d}" / attempt)
    files = []
    for name, data in contents.items():
        storage.publish_bytes(storage.join(url, name), data)
        files.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    storage.publish_document(f"{url}/COMMITTED", {"step": step, "files": files, "state": {}}, SCHEMA)
    return url


def test_only_committed_checkpoints_are_seen_and_only_their_files_fetched(tmp_path):
    url = commit(tmp_path, 10, "000001-0000", {"state/a.pt": b"a"})
    storage.publish_bytes(storage.join(url, "state/of-another-world-size.pt"), b"stale")
    storage.publish_bytes(str(tmp_path / "checkpoints" / "step-00000020" / "000001-0000" / "state" / "a.pt"), b"cut")
    (found,) = list_checkpoints(str(tmp_path))
    assert (found.step, found.url) == (10, url)
    fetch(found, tmp_path / "local")
    assert [path.name for path in (tmp_path / "local").rglob("*.pt")] == ["a.pt"]


def test_the_newest_attempt_of_the_newest_step_comes_last(tmp_path):
    for step, attempt in ((20, "000001-0000"), (10, "000003-0000"), (20, "000002-0001")):
        commit(tmp_path, step, attempt, {"x": b""})
    found = [(item.step, item.url.rpartition("/")[2]) for item in list_checkpoints(str(tmp_path))]
    assert found == [(10, "000003-0000"), (20, "000001-0000"), (20, "000002-0001")]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    url = commit(tmp_path, 10, "000001-0000", {"state/a.pt": b"a"})
    if damage == "missing":
        storage.remove(storage.join(url, "state/a.pt"))
    else:
        storage.publish_bytes(storage.join(url, "state/a.pt"), b"b")
    with pytest.raises(UserError, match=r"state/a\.pt of checkpoint .*remove .*COMMITTED"):
        fetch(list_checkpoints(str(tmp_path))[0], tmp_path / "local")


def test_pruning_keeps_the_newest_and_what_is_being_written(tmp_path):
    for step in (10, 20, 30):
        commit(tmp_path, step, "000001-0000", {"x": b"x"})
    storage.publish_bytes(str(tmp_path / "checkpoints" / "step-00000020" / "000002-0000" / "cut.pt"), b"cut")
    storage.publish_bytes(str(tmp_path / "checkpoints" / "step-00000040" / "000002-0000" / "now.pt"), b"now")
    prune(str(tmp_path), keep_last=2, keep_every=None, lease=None)
    left = sorted(entry.name for entry in storage.walk(str(tmp_path / "checkpoints")))
    assert left == [
        "step-00000020/000001-0000/COMMITTED",
        "step-00000020/000001-0000/x",
        "step-00000030/000001-0000/COMMITTED",
        "step-00000030/000001-0000/x",
        "step-00000040/000002-0000/now.pt",
    ]


def test_pruning_keeps_milestones(tmp_path):
    for step in (10, 20, 30, 40, 50):
        commit(tmp_path, step, "000001-0000", {"x": b"x"})
    prune(str(tmp_path), keep_last=1, keep_every=20, lease=None)
    assert [found.step for found in list_checkpoints(str(tmp_path))] == [20, 40, 50]


def test_a_node_fetches_what_its_own_ranks_load():
    names = ["state/zero_pp_rank_11_mp_rank_00_optim_states.pt", "state/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"]
    names += ["state/zero_pp_rank_0_mp_rank_00_model_states.pt", "state/mp_rank_00_model_states.pt"]
    assert [owner(name) for name in names] == [11, 3, 0, None]


class Lonely(World):
    """The only process."""

    def __init__(self) -> None:
        self.rank, self.local_rank, self.size, self.node, self.nodes = 0, 0, 1, 0, [0]
        self._control = None


class TinyEngine:
    def checkpoint_bytes(self) -> int:
        return 7

    def save(self, folder: Path, on_written: Callable[[], object]) -> None:
        (folder / "weights.pt").write_bytes(b"weights")


def test_uploads_that_fail_now_and_then_cost_checkpoints_and_not_the_run(tmp_path, monkeypatch, caplog):
    away = False
    publish_file = storage.publish_file

    def publish(path: Path, url: str) -> None:
        if away:
            raise StorageUnavailable("bucket: quota exceeded")
        publish_file(path, url)

    monkeypatch.setattr(storage, "publish_file", publish)
    saver = Saver(Lonely(), str(tmp_path), "000001-0000", None, {}, keep_last=9, keep_every=None)
    for step in range(1, 8):
        away = step % 3 > 0  # two of three fail
        saver.save(TinyEngine(), step, {}, is_last=False)
        saver.join()
    assert [found.step for found in list_checkpoints(str(tmp_path))] == [3, 6]
    assert "a checkpoint is lost: bucket: quota exceeded" in caplog.text
    away = True
    for step in range(8, 7 + MOST_FAILED_IN_A_ROW):
        saver.save(TinyEngine(), step, {}, is_last=False)
    with pytest.raises(StorageUnavailable, match="quota"):  # that of step 7 failed too
        saver.save(TinyEngine(), 20, {}, is_last=False)
    saver.save(TinyEngine(), 21, {}, is_last=False)
    with pytest.raises(StorageUnavailable, match="quota"):
        saver.finish()
