from __future__ import annotations

import json

import pytest

from clipmill.config import TrainingConfig
from clipmill.training.schedule import average_weight, learning_rate
from clipmill.training.zero.engine import deepspeed_config


def test_the_private_name_that_avoids_compiling_at_every_start_still_exists():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_expert_settings_are_merged_over_the_derived_document():
    config = TrainingConfig(zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": False}, "dump_state": True})
    document = deepspeed_config(config, rows=4, accumulation=2, world_size=3, num_parameters=10**6)
    zero = {"stage": 2, "reduce_bucket_size": 125_000, "compute_grad_norm": False, "overlap_comm": False}
    assert document["zero_optimization"] == zero
    assert (document["train_batch_size"], document["gradient_accumulation_steps"]) == (24, 2)
    assert document["dump_state"]


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("gradient_clipping", "grad_clip"),
        ("train_batch_size", "global_batch"),
        ("optimizer", "lr, betas and weight_decay"),
        ("scheduler", "lr, warmup_steps, schedule and min_lr_share"),
        ("bf16", "precision"),
        ("fp16", "precision"),
        ("zero_optimization.stage", "zero_stage"),
        ("zero_optimization.offload_optimizer", "offload"),
    ],
)
def test_expert_settings_must_not_say_what_ours_say(key, ours):
    section, _, name = key.rpartition(".")
    with pytest.raises(ValueError, match=f"deepspeed: clipmill sets {key} from {ours}; set {ours} instead"):
        TrainingConfig(deepspeed={section: {name: {"enabled": True}}} if section else {name: {"enabled": True}})


def test_expert_settings_without_an_effect_are_refused():
    with pytest.raises(ValueError, match=r"gradient_clippin would have no effect; keys that have one: .*aio"):
        TrainingConfig(deepspeed={"gradient_clippin": 1.0})
    with pytest.raises(ValueError, match="zero_optimization True must be a section of keys"):
        TrainingConfig(deepspeed={"zero_optimization": True})


def test_the_learning_rate_warms_up_then_follows_a_cosine_to_its_floor():
    config = TrainingConfig(steps=110, lr=1.0, warmup_steps=10, min_lr_share=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)
    assert learning_rate(config, 10_000) == pytest.approx(0.1)
    assert learning_rate(config.model_copy(update={"schedule": "constant"}), 100) == 1.0


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_document_is_plain_json(stage, offload):
    if offload and stage == 0:
        with pytest.raises(ValueError, match="offload needs zero_stage 1, 2 or 3"):
            TrainingConfig(zero_stage=0, offload=True)
        return
    config = TrainingConfig(zero_stage=stage, offload=offload, grad_clip=0.5)
    document = deepspeed_config(config, rows=4, accumulation=1, world_size=2, num_parameters=10**10)
    assert json.loads(json.dumps(document)) == document
    overlaps = stage in (1, 2) and not offload
    assert document["zero_optimization"].get("overlap_comm") == (None if stage == 3 else overlaps)
    assert document["zero_optimization"]["reduce_bucket_size"] == (50_000_000 if overlaps else 500_000_000)
    assert ("offload_optimizer" in document["zero_optimization"]) == offload
    ours = stage < 3 and not offload  # who clips
    assert document["gradient_clipping"] == (0 if ours else 0.5)


def test_compiling_stage_3_is_refused():
    with pytest.raises(ValueError, match="compile needs zero_stage 0, 1 or 2"):
        TrainingConfig(zero_stage=3, compile=True)


def test_the_average_begins_as_the_weights_and_slows_down_to_its_decay():
    config = TrainingConfig(weights_ema=0.99)
    assert average_weight(config, 0) == 1
    assert average_weight(config, 90) == pytest.approx(0.1)
    assert average_weight(config, 10_000) == pytest.approx(0.01)
