from __future__ import annotations

from pathlib import Path

import pytest

from clipmill.config import RunConfig
from clipmill.lease import hold
from clipmill.pipeline import shard
from clipmill.pipeline.plan import PlannedVideo, load_plan
from clipmill.pipeline.planning import retry_videos
from clipmill.shards.manifest import SPLITS
from tests.pipeline.corpus import extend_plan, make_plan, run_config, video_bytes


@pytest.mark.parametrize("span", ["", "1"])
def test_a_file_that_came_is_looked_at_again_and_planned_once(tmp_path: Path, span: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(video_bytes(number, 9))
    table = tmp_path / "table.csv"
    table.write_text(f"url,start\n0.mp4,\n1.mp4,\n2.mp4,\nlate.mp4,{span}\nnever.mp4,\n0.mp4,x\n")
    source = {"type": "table", "url": str(table), "columns": {"start": "start"}}
    config = run_config(tmp_path / "run", table, source=source)
    plan = make_plan(config)
    (tmp_path / "late.mp4").write_bytes(video_bytes(7, 9))
    faulty = [video.id for video in all_videos(config) if video.fault is not None]
    assert len(faulty) == 3
    with hold(shard.folder_url(config), "shard") as lease:
        assert retry_videos(config, lease, plan, faulty)
    retried = [video for video in all_videos(config) if video.id in faulty]
    faults = {(video.url, video.fault is None) for video in retried}
    assert faults == {("late.mp4", False), ("late.mp4", True), ("never.mp4", False), ("0.mp4", False)}
    (revived,) = [video for video in retried if video.fault is None]
    assert revived.bytes == (tmp_path / "late.mp4").stat().st_size
    assert not extend_plan(config)  # it is in the plan


def test_a_file_that_an_extension_found_is_not_revived(tmp_path: Path) -> None:
    (tmp_path / "0.mp4").write_bytes(video_bytes(0, 9))
    table = tmp_path / "table.csv"
    table.write_text("url\n0.mp4\nlate.mp4\n")
    config = run_config(tmp_path / "run", table, source={"type": "table", "url": str(table)})
    make_plan(config)
    (faulty,) = [video.id for video in all_videos(config) if video.fault is not None]
    (tmp_path / "late.mp4").write_bytes(video_bytes(7, 9))
    assert extend_plan(config)
    with hold(shard.folder_url(config), "shard") as lease:
        assert retry_videos(config, lease, load_plan(config), [faulty])
    assert [video.fault is None for video in all_videos(config) if video.url == "late.mp4"].count(True) == 1


def all_videos(config: RunConfig) -> list[PlannedVideo]:
    plan = load_plan(config)
    units = [(split, number) for split in SPLITS for number in range(plan.num_units(split))]
    return [video for split, number in units for video in plan.unit(split, number).videos]
