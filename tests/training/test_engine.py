from __future__ import annotations

import pytest

from clipmill.config import TrainingConfig
from clipmill.training.engine import deepspeed_config
from clipmill.training.loop import learning_rate


def test_the_private_name_that_avoids_compiling_at_every_start_still_exists():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_expert_settings_are_merged_over_the_derived_document():
    config = TrainingConfig(zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": False}, "extra": 1})
    document = deepspeed_config(config, rows=4, accumulation=2, world_size=3)
    assert document["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert (document["train_batch_size"], document["gradient_accumulation_steps"], document["extra"]) == (24, 2, 1)


def test_the_learning_rate_warms_up_then_follows_a_cosine_to_its_floor():
    config = TrainingConfig(steps=110, lr=1.0, warmup_steps=10, min_lr_share=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)
    assert learning_rate(config, 10_000) == pytest.approx(0.1)
    assert learning_rate(config.model_copy(update={"schedule": "constant"}), 100) == 1.0
