"""Where a training goes on, and whether it may: what is decided before and after an engine loads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clipmill import storage
from clipmill.config import TrainingConfig
from clipmill.errors import StageFailed, UserError
from clipmill.training.checkpoint import SCHEMA
from clipmill.training.resume import Start, resume

STATE = {
    "identity": {"tokens": "fingerprint", "layers": 2},
    "world_size": 2,
    "zero_stage": 1,
    "offload": False,
    "num_groups": 1,
    "rows": 8,
}


def committed(folder: Path, step: int = 4, **state: Any) -> None:
    url = str(folder / "checkpoints" / f"step-{step:08d}" / "000001-0000")
    storage.publish_bytes(storage.join(url, "weights.pt"), b"")
    file = {"name": "weights.pt", "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    record = {"step": step, "files": [file], "state": {**STATE, "probe_loss": 2.0, **state}}
    storage.publish_document(storage.join(url, "COMMITTED"), record, SCHEMA)


def begin(folder: Path, loss: float = 2.0, state: dict[str, Any] = STATE, **settings: Any) -> Start:
    """`resume` with an engine that loads nothing and has this loss on the probe's clips."""
    world = SimpleNamespace(rank=0, local_rank=0, local_size=1, node=0, barrier=lambda: None)
    world.from_rank_zero = lambda make: make()
    engine: Any = SimpleNamespace(world=world, load=lambda _: None, load_converted=lambda *_: None)
    config = TrainingConfig(steps=10, **settings)
    return resume(engine, config, str(folder), state, is_restart=False, batch_statistics=False, probe=lambda: loss)


def test_what_a_checkpoint_counted_goes_on(tmp_path: Path) -> None:
    assert begin(tmp_path) == Start(0, 0, 0)
    committed(tmp_path, dataset_since=3, skipped_steps=2)
    assert begin(tmp_path) == Start(4, 3, 2)


def test_a_conversion_that_changes_the_loss_is_refused_on_the_clips_it_was_recorded_of(tmp_path: Path) -> None:
    committed(tmp_path)
    fewer = {**STATE, "world_size": 1}
    assert begin(tmp_path, state=fewer).step == 4
    with pytest.raises(StageFailed, match=r"loss 2\.0 when it was saved and 3\.0 once converted"):
        begin(tmp_path, loss=3.0, state=fewer)
    others = {**fewer, "identity": {"tokens": "another", "layers": 2}}
    assert begin(tmp_path, loss=3.0, state=others, accept_new_dataset=True) == Start(4, 4, 0)


def test_a_training_that_starts_from_another_has_steps_left(tmp_path: Path) -> None:
    committed(tmp_path / "other", step=10)
    with pytest.raises(UserError, match=r"has 10 steps behind it, and training\.steps is 10; raise training\.steps"):
        begin(tmp_path / "own", resume=str(tmp_path / "other"))
    committed(tmp_path / "other", step=9)
    committed(tmp_path / "own", step=10)  # this run has ended: nothing to do
    assert begin(tmp_path / "own", resume=str(tmp_path / "other")).step == 10
