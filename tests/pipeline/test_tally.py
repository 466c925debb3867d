from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.pipeline import tally as tally_module
from clipmill.pipeline.plan import Plan
from clipmill.pipeline.tally import Tally, publish_tally, read_tally
from clipmill.shards.commits import commit_unit
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


def segments(config: RunConfig) -> dict[str, bytes]:
    url = config.folder("clips", "tally")
    return {entry.name: storage.read_bytes(storage.join(url, entry.name)) for entry in storage.list_folder(url)}


def test_only_records_that_no_segment_has_are_read(
    planned: tuple[RunConfig, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plan = planned
    assert plan.num_units("train") > 3
    for number in (0, 1, 3):
        commit(config, plan, "train", number)
    publish_tally(config, read_tally(config, plan))
    first = segments(config)
    commit(config, plan, "train", 2)
    commit(config, plan, "val", 0)
    read = records_read(monkeypatch)
    resumed = read_tally(config, plan)
    assert read == [2, 0]
    publish_tally(config, resumed)
    publish_tally(config, resumed)  # nothing is left to write
    assert list(segments(config)) == ["000001.json", "000002.json"]
    assert segments(config).items() >= first.items()
    again = read_tally(config, plan)
    assert read == [2, 0]
    assert again == replace(resumed, unpublished=[])
    assert again.total("pixel_sum") == 5 * 2**70


def test_the_same_units_are_the_same_bytes(planned: tuple[RunConfig, Plan]) -> None:
    config, plan = planned
    for number in (3, 0, 2):
        commit(config, plan, "train", number)
    publish_tally(config, read_tally(config, plan))
    (content,) = segments(config).values()
    storage.remove_tree(config.folder("clips", "tally"))
    backwards = Tally()
    for unit in reversed(json.loads(content)["units"]):
        backwards.add(unit)
    publish_tally(config, backwards)
    assert segments(config) == {"000001.json": content}


def test_units_that_two_segments_have_count_once(planned: tuple[RunConfig, Plan]) -> None:
    config, plan = planned
    commit(config, plan, "train", 0)
    one, other = read_tally(config, plan), read_tally(config, plan)  # of a run, and of the one that took over
    publish_tally(config, one)
    publish_tally(config, other)
    assert list(segments(config)) == ["000001.json", "000002.json"]
    assert read_tally(config, plan).total("num_short") == 1


def test_a_unit_without_a_record_is_not_counted(
    planned: tuple[RunConfig, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plan = planned
    for number in range(3):
        commit(config, plan, "train", number)
        publish_tally(config, read_tally(config, plan))
    storage.remove(config.folder("clips", "train", "commits", "000001.json"))
    read = records_read(monkeypatch)
    believed = read_tally(config, plan)
    assert believed.parts["train"].keys() == {0, 2}
    assert believed.total("num_short") == 2
    assert read == []
    assert list(segments(config)) == ["000001.json", "000003.json"]


@pytest.mark.parametrize(
    "content",
    [
        '{"schema": 3, "uni',
        '{"schema": 3, "units": 7}',
        '{"schema": 3, "units": [{"split": "train", "unit": 0}]}',
        '{"schema": 3, "units": [{"split": "train", "unit": 0, "parts": [{"name": "../../x.tar"}]}]}',
    ],
)
def test_a_damaged_segment_costs_time_only(planned: tuple[RunConfig, Plan], content: str) -> None:
    config, plan = planned
    for number in range(3):
        commit(config, plan, "train", number)
    publish_tally(config, read_tally(config, plan))
    storage.publish_bytes(config.folder("clips", "tally", "000001.json"), content.encode())
    believed = read_tally(config, plan)
    assert believed.total("num_short") == 3
    publish_tally(config, believed)
    assert list(segments(config)) == ["000001.json", "000002.json"]


def test_nothing_counted_is_nothing_written(planned: tuple[RunConfig, Plan]) -> None:
    config, _ = planned
    publish_tally(config, Tally())
    assert segments(config) == {}
