"""What a config says of clips that are there already must be true; what it leaves open becomes true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clipmill.config import RunConfig, load_config, with_recorded_clips
from clipmill.errors import UserError
from clipmill.stages import run_stage
from tests.training import toy

RECIPE = {
    "clip": {"num_frames": 8, "frame_stride": 2, "resolution": [36, 64], "fit": "pad", "fps": None},
    "format": "mjpeg",
    "quality": 80,
}


def recorded(*assignments: str, recipes: dict[str, Any] | None = None) -> RunConfig:
    return with_recorded_clips(load_config([], ["root=runs/x", *assignments]), recipes or {"clips": RECIPE})


def test_keys_at_their_defaults_become_those_of_the_clips() -> None:
    data = recorded("vqvae.training.steps=1").data
    assert (data.clip.num_frames, data.clip.frame_stride, data.clip.resolution) == (8, 2, (36, 64))
    assert (data.clip.fit, data.format, data.jpeg_quality, data.crf) == ("pad", "mjpeg", 80, 16)


def test_keys_that_agree_with_the_clips_are_fine() -> None:
    assert recorded("data.clip.num_frames=8", "data.format=mjpeg", "data.jpeg_quality=80").data.clip.num_frames == 8
    square = {"clips": {"clip": {"resolution": 64}}}
    assert recorded("data.clip.resolution=[64,64]", recipes=square).data.clip.resolution == 64


def test_keys_of_another_stage_cause_no_refusal() -> None:
    data = recorded("data.crf=30", "data.val_fraction=0.5", "data.source.url=elsewhere", "data.decoder=pyav").data
    assert (data.crf, data.val_fraction, data.format) == (30, 0.5, "mjpeg")


@pytest.mark.parametrize(
    ("assignments", "named"),
    [
        (["data.clip.num_frames=16"], [r"data\.clip\.num_frames \(8 -> 16\)"]),
        (["data.clip.resolution=64"], [r"data\.clip\.resolution \(\[36, 64\] -> 64\)"]),
        (["data.format=npy"], [r"data\.format \('mjpeg' -> 'npy'\)"]),
        (["data.jpeg_quality=95"], [r"data\.jpeg_quality \(80 -> 95\)"]),
        (["data.clip.fit=crop", "data.clip.fps=10"], [r"data\.clip\.fit", r"data\.clip\.fps \(None -> 10"]),
    ],
)
def test_keys_that_differ_are_named(assignments: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        recorded(*assignments)
    for pattern in named:
        assert refusal.match(pattern)
    assert "\n" not in str(refusal.value)


def test_a_key_must_be_that_of_each_data_set_of_a_mixture() -> None:
    recipes = {"one": RECIPE, "two": {**RECIPE, "clip": {**RECIPE["clip"], "frame_stride": 1}}}
    assert recorded(recipes=recipes).data.clip.frame_stride == 2
    with pytest.raises(UserError, match=r"the clips at two .*data\.clip\.frame_stride \(1 -> 2\)"):
        recorded("data.clip.frame_stride=2", recipes=recipes)


def test_settings_of_a_foreign_manifest_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"settings that this clipmill does not support .*num_frames"):
        recorded(recipes={"clips": {"clip": {"num_frames": "../.."}}})


def test_training_is_refused_or_records_what_is_true(tmp_path: Path) -> None:
    toy.write_inputs(tmp_path)  # clips of 4 frames of 16 x 16
    shared = {"root": str(tmp_path / "root"), "cluster": {"training_launcher": "process"}}
    settings = {**toy.CONFIG["vqvae"], "training": {"global_batch": 4, "steps": 1, "loader_workers": 0}}
    lying = RunConfig.model_validate({**shared, "vqvae": settings, "data": {"clip": {"num_frames": 16}}})
    with pytest.raises(UserError, match=r"data\.clip\.num_frames \(4 -> 16\)"):
        run_stage("train-vqvae", lying)
    assert not (tmp_path / "root" / "vqvae").exists()
    run_stage("train-vqvae", RunConfig.model_validate({**shared, "vqvae": settings}))
    found = yaml.safe_load((tmp_path / "root" / "vqvae" / "config.yaml").read_text())
    assert (found["data"]["clip"]["num_frames"], found["data"]["clip"]["resolution"]) == (4, 16)
