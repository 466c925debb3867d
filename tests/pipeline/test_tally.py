from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.pipeline import tally as tally_module
from clipmill.pipeline.plan import Plan
from clipmill.pipeline.tally import Tally, publish_tally, read_tally
from clipmill.shards.manifest import commit_unit
from tests.pipeline.corpus import make_plan, run_config, write_corpus


def commit(config: RunConfig, plan: Plan, split: str, number: int) -> None:
    videos = [
        {"id": video.id, "label": video.label, "clips": 2 + number, "static": 0, "black": 0, "truncated": False}
        | {"actions": False}
        for video in plan.unit(split, number).videos
    ]
    body = {
        "split": split,
        "videos": videos[1:],
        "exclusions": [{"id": video["id"], "url": "x", "cause": "bad"} for video in videos[:1]],
        "num_short": 1,
        "pixels": {"num_values": 3, "pixel_sum": 2**70, "pixel_square_sum": 5},
        "encoding": {"num_measured_clips": 1, "num_measured_values": 2, "squared_error": 3},
        "versions": {"clipmill": str(number % 2)},
    }
    commit_unit(config.folder("clips", split), number, [], body)


@pytest.fixture
def planned(tmp_path: Path) -> tuple[RunConfig, Plan]:
    write_corpus(tmp_path / "source")
    config = run_config(tmp_path / "run", tmp_path / "source")
    return config, make_plan(config)


def records_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the numbers of the units whose records are read."""
    read: list[int] = []
    real = tally_module.read_commits

    def recording(url: str, units: list[int]) -> Any:
        read.extend(units)
        return real(url, units)

    monkeypatch.setattr(tally_module, "read_commits", recording)
    return read


def test_only_records_that_the_tally_does_not_know_are_read(
    planned: tuple[RunConfig, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plan = planned
    assert plan.num_units("train") > 3
    for number in (0, 1, 3):
        commit(config, plan, "train", number)
    publish_tally(config, read_tally(config, plan))
    commit(config, plan, "train", 2)
    commit(config, plan, "val", 0)
    read = records_read(monkeypatch)
    resumed = read_tally(config, plan)
    assert read == [2, 0]
    storage.remove(config.folder("clips", "tally.json"))
    counted = read_tally(config, plan)
    assert counted.total("pixel_sum") == 5 * 2**70
    publish_tally(config, counted)
    counted_bytes = storage.read_bytes(config.folder("clips", "tally.json"))
    publish_tally(config, resumed)
    assert storage.read_bytes(config.folder("clips", "tally.json")) == counted_bytes


@pytest.mark.parametrize("damage", ["removed record", "damaged tally"])
def test_a_tally_that_cannot_be_right_is_not_believed(planned: tuple[RunConfig, Plan], damage: str) -> None:
    config, plan = planned
    for number in range(3):
        commit(config, plan, "train", number)
    publish_tally(config, read_tally(config, plan))
    if damage == "removed record":
        storage.remove(config.folder("clips", "train", "commits", "000001.json"))
    else:
        storage.publish_bytes(config.folder("clips", "tally.json"), b'{"schema": 1, "spl')
    believed = read_tally(config, plan)
    wanted = {0, 2} if damage == "removed record" else {0, 1, 2}
    assert believed.committed["train"] == wanted
    assert believed.total("num_short") == len(wanted)


def test_nothing_counted_is_nothing_written(planned: tuple[RunConfig, Plan]) -> None:
    config, _ = planned
    publish_tally(config, Tally())
    assert not storage.exists(config.folder("clips", "tally.json"))
