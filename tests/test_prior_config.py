from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clipmill.config import PRESETS, PriorModelConfig, identity, load_config
from clipmill.errors import UserError
from clipmill.models.prior import Prior

SIZES = {"100m": 1e8, "350m": 3.5e8, "1b": 1e9, "3b": 3e9, "7b": 7e9}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_has_the_size_of_its_name(preset: str) -> None:
    with torch.device("meta"):
        prior = Prior(PriorModelConfig(preset=preset), (4, 32, 32), 1024, torch.empty(1024, 256))
    num_parameters = sum(parameter.numel() for parameter in prior.parameters())
    if preset in SIZES:
        assert num_parameters == pytest.approx(SIZES[preset], rel=0.08)
    assert all(not buffer.is_floating_point() or buffer.numel() < 1e6 for buffer in prior.buffers())


def test_explicit_keys_override_the_preset_and_only_they_count() -> None:
    config = PriorModelConfig(preset="1b", num_layers=2)
    assert (config.style, config.hidden_dim, config.num_layers) == ("modern", 2048, 2)
    spelt_out = PriorModelConfig(**{**PRESETS["1b"], "num_layers": 2})
    assert identity(config) == identity(spelt_out)


def test_a_resolved_config_resolves_to_itself() -> None:
    config = PriorModelConfig(preset="350m", dropout=0.1)
    assert PriorModelConfig.model_validate(config.model_dump()) == config


def test_published_presets_are_the_published_sizes() -> None:
    config = PriorModelConfig(preset="videogpt-bair")
    assert config == PriorModelConfig(preset="videogpt-bair", hidden_dim=512, num_heads=4, num_layers=16)
    assert (config.dropout, config.attention_dropout, config.mlp_width) == (0.2, 0.3, 2048)


def test_swiglu_is_as_large_as_a_plain_network_of_four_times_the_width() -> None:
    width = PriorModelConfig(style="modern", hidden_dim=768, num_heads=12).mlp_width
    assert width == 2048
    assert math.isclose(3 * width, 2 * 4 * 768)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("preset=2b", r"unknown preset '2b'; choose from videogpt-bair, .*7b"),
        ("num_kv_heads=2", "num_kv_heads needs style=modern"),
        ("num_heads=5", "hidden_dim 576 must be a multiple of num_heads 5"),
        ("style=modern prior.model.num_kv_heads=3", "num_heads 4 must be a multiple of num_kv_heads 3"),
        ("style=modern prior.model.hidden_dim=12", "gives 3 channels a head"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config([], ["root=x", *f"prior.model.{assignment}".split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_layers", [2, 4, 8, 16])
def test_depth_ablations_lie_over_a_configuration(num_layers: int) -> None:
    configs = Path(__file__).resolve().parents[1] / "configs"
    config = load_config([configs / "bair.yaml", configs / "ablations" / f"prior-layers-{num_layers}.yaml"])
    assert (config.prior.model.num_layers, config.prior.model.hidden_dim) == (num_layers, 512)
