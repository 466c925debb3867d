"""The configurations of the paper's data sets, from their layouts to frozen splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clipmill.config import load_config
from clipmill.moving_mnist import generate
from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.manifest import Manifest
from clipmill.stages import run_stage
from tests.pipeline.sources.fixtures import write_bair, write_tgif, write_ucf101
from tests.test_moving_mnist import draw_digits

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(
    ("name", "write", "num_clips", "resolution"),
    [
        ("bair", lambda folder: write_bair(folder, num_frames=18), {"train": 3, "val": 2}, 64),
        ("ucf101", lambda folder: write_ucf101(folder, num_frames=18), {"train": 4, "val": 2}, 128),
        ("tgif", lambda folder: write_tgif(folder, num_frames=18, splits=True), {"train": 4, "val": 2}, 128),
        ("moving-mnist", lambda file: generate(draw_digits(), str(file), num_videos=16), {"train": 14, "val": 2}, 64),
    ],
)
def test_a_shipped_config_shards_its_data_set(
    embedded: None,
    tmp_path: Path,
    name: str,
    write: Callable[[Path], object],
    num_clips: dict[str, int],
    resolution: int,
) -> None:
    data = tmp_path / ("data.npy" if name == "moving-mnist" else "data")
    write(data)
    keys = [f"root={tmp_path / 'run'}", f"data.source.url={data}", "cluster.num_cpus=2"]
    if name == "tgif":
        keys.append("data.source.split_files=splits")
    config = load_config([CONFIGS / f"{name}.yaml"], keys)
    summary = run_stage("shard", config)
    assert summary is not None
    assert {split: counts["clips"] for split, counts in summary["splits"].items()} == num_clips
    assert summary["failed"] == 0
    assert (summary["with_actions"] > 0) == (name == "bair")
    dataset = ShardDataset(Manifest.load(config.folder("clips", "train"), "clips"), decode_clip)
    assert dataset[0]["video"].shape == (16, resolution, resolution, 3)
    assert run_stage("shard", config) is None
