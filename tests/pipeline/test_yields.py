from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipmill.config import ClipConfig, RunConfig
from clipmill.lease import hold
from clipmill.pipeline.budget import Allowance
from clipmill.pipeline.plan import Plan, load_plan
from clipmill.pipeline.planning import retry_videos, units, yields
from clipmill.pipeline.planning.yields import NOTHING_KNOWN, Yield, measure_yield
from clipmill.pipeline.unit import make_worker
from clipmill.video import write_raw_video
from tests.pipeline.corpus import listed, make_plan, run_config, video_bytes


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of which a byte makes much or little, and some that fail."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(0)
    for number in range(60):
        num_frames = int(random.integers(10, 60))
        if number % 6:
            (folder / f"small{number:02d}.mp4").write_bytes(video_bytes(number, num_frames))
        else:
            noise = random.integers(0, 256, (num_frames, 24, 32, 3), np.uint8)
            write_raw_video(folder / f"raw{number:02d}.nut", noise, 12.5)
    (folder / "bad.mp4").write_text("no video\n" * 5000)
    (folder / "broken.mp4").write_bytes(video_bytes(1, 40)[:3000])
    return folder


@pytest.fixture(autouse=True)
def _small_data_sets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_LEAST_OUTPUT_BYTES", 1)
    monkeypatch.setattr(yields, "SMALL_BYTES", 2**17)


def config_for(root: Path, source: Path, **data: Any) -> RunConfig:
    return run_config(root, source, **{"unit_bytes": 2**40, "val_fraction": 0.0, **data})


def sharded(config: RunConfig, plan: Plan) -> dict[str, list[int]]:
    """Sizes of the tars of each split, made in this process."""
    sizes: dict[str, list[int]] = {}
    with hold(config.folder("clips"), "shard") as lease:
        work = make_worker(config, lease, Allowance(100, is_new=False))
        for split in ("train", "val"):
            for number in range(plan.num_units(split)):
                work(plan.unit(split, number))
            sizes[split] = [path.stat().st_size for path in Path(config.folder("clips", split)).glob("*.tar")]
    return sizes


@pytest.mark.parametrize(
    "data",
    [
        {"format": "mp4", "clip": {"num_frames": 8, "resolution": 32}},
        {"format": "npy", "clip": {"num_frames": 4, "clip_stride": 2, "resolution": [16, 32]}},
        {"format": "mjpeg", "clip": {"num_frames": 4, "fps": 10, "resolution": 16, "max_clips_per_video": 5}},
        {"format": "npy", "clip": {"num_frames": 4, "resolution": 16, "views_per_clip": 2, "min_seconds": 2}},
    ],
)
def test_shards_are_near_shard_bytes_whatever_the_source(mixed: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    total = sum(sharded(config := config_for(tmp_path / "whole", mixed, **data), make_plan(config))["train"])
    shard_bytes = total // 4
    config = config_for(tmp_path / "run", mixed, shard_bytes=shard_bytes, **data)
    plan = make_plan(config)
    found = Yield.of_generation(plan.generations[0])
    assert found.num_videos > 10
    assert found.bytes_per_byte == pytest.approx(total / plan.generations[0]["bytes"], rel=0.3)
    sizes = sharded(config, plan)["train"]
    assert 3 <= len(sizes) <= 6
    assert 0.5 * shard_bytes < min(sizes)
    assert max(sizes) < 1.6 * shard_bytes


def test_a_look_is_repeatable_and_recorded(mixed: Path, tmp_path: Path) -> None:
    plans = [make_plan(config_for(tmp_path / name, mixed)) for name in ("one", "two")]
    assert plans[0].generations == plans[1].generations
    document = plans[0].generations[0]["yield"]
    assert document.keys() == {"bytes_per_byte", "bytes_per_clip", "fps", "num_videos"}
    assert document["fps"] == pytest.approx(12.5, rel=0.05)


def test_videos_that_are_tried_again_are_cut_by_what_is_known(mixed: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, mixed)
    plan = make_plan(config)
    video = plan.unit("train", 0).videos[0]
    with hold(config.folder("clips"), "shard") as lease:
        assert retry_videos(config, lease, plan, [video.id])
    first, second = load_plan(config).generations
    assert first["yield"] == second["yield"]


def test_a_small_source_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yields, "Decoder")
    (tmp_path / "a.mp4").write_bytes(video_bytes(1, 8))
    config = config_for(tmp_path / "run", tmp_path)
    table = listed(config)
    assert measure_yield(config, [table], sum(table["bytes"].to_pylist())) == NOTHING_KNOWN


def test_where_no_video_can_be_looked_at_bytes_are_taken_for_bytes(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]) * 2**20)
    config = config_for(tmp_path / "run", tmp_path)
    table = listed(config)
    assert measure_yield(config, [table], sum(table["bytes"].to_pylist())) == NOTHING_KNOWN
    assert NOTHING_KNOWN.of(table, config.data.clip).tolist() == [1.0 * 2**20] * 4


def test_spans_make_what_their_seconds_hold() -> None:
    known = Yield(bytes_per_byte=0.5, bytes_per_clip=1000.0, fps=10.0, num_videos=3)
    table = pa.table(
        {
            "bytes": [800, 800, 800, 800, 800],
            "start_seconds": pa.array([None, 1.0, None, 3.0, 2.0], pa.float64()),
            "end_seconds": pa.array([None, 4.2, 1.5, None, 2.5], pa.float64()),
        }
    )
    expected = known.of(table, ClipConfig(num_frames=8, clip_stride=4))
    # Whole file; 32 frames; 15 frames; to the end, which is not known; 5 frames, too few for a clip.
    assert expected.tolist() == [400.0, 7000.0, 2000.0, 400.0, 0.0]


def test_broken_videos_are_not_looked_at_for_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(40):
        (tmp_path / f"{number}.mp4").write_bytes(video_bytes(number, 9)[:32] + bytes([number]) * 2**15)
    config = config_for(tmp_path / "run", tmp_path)
    table = listed(config)
    caplog.set_level("DEBUG", logger=yields.__name__)
    assert measure_yield(config, [table], sum(table["bytes"].to_pylist())) == NOTHING_KNOWN
    assert len(caplog.records) == 8
