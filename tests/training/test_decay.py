from __future__ import annotations

import torch
from torch import nn

from clipmill.config import PriorModelConfig, VQVAEModelConfig
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.training.decay import group_names, parameter_groups

SIZES = {"hidden_dim": 24, "num_heads": 2, "num_layers": 2}


def split(module: nn.Module) -> tuple[set[str], set[str]]:
    """Last parts of the names of the parameters that decay, and of those that do not."""
    groups = parameter_groups(module, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = group_names(module, groups)
    assert sorted(names[0] + names[1]) == sorted(name for name, _ in module.named_parameters())
    decayed, constant = ({name.removeprefix("blocks.0.") for name in part if "blocks.1." not in name} for part in names)
    return decayed, constant


def test_the_published_prior() -> None:
    config = PriorModelConfig.model_validate({**SIZES, "condition": "actions", "condition_dropout": 0.1})
    decayed, constant = split(Prior(config, (2, 4, 4), 8, torch.randn(8, 4), condition_shape=(4, 3)))
    assert decayed == {
        "input.project.weight",
        "condition.project.weight",
        "attention.qkv.weight",
        "attention.out.weight",
        "up_projection.weight",
        "down_projection.weight",
        "cross.q.weight",
        "cross.kv.weight",
        "cross.out.weight",
        "head.weight",
    }
    assert {"norms.table", "input.axes.0", "condition.axes.0", "input.start", "condition.null"} <= constant


def test_the_modern_prior() -> None:
    prior = Prior(PriorModelConfig.model_validate({**SIZES, "style": "modern"}), (2, 4, 4), 8, None)
    _, constant = split(prior)
    assert constant == {"norms.table", "attention.qk_gain", "input.start"}


def test_the_tokenizer() -> None:
    model = VQVAE(VQVAEModelConfig(hidden_dim=8, num_res_layers=1, embedding_dim=4, num_codes=16), 0.1)
    names = group_names(model, parameter_groups(model, weight_decay=0.1))
    parameters = dict(model.named_parameters())
    assert {parameters[name].dim() for name in names[1]} == {1}
    assert all(name.endswith("weight") for name in names[0])


@torch.no_grad()
def test_a_gain_without_gradient_stays_where_it_is() -> None:
    prior = Prior(PriorModelConfig.model_validate({**SIZES, "style": "modern"}), (2, 4, 4), 8, None)
    optimizer = torch.optim.AdamW(parameter_groups(prior, weight_decay=0.5), lr=0.1)
    for parameter in prior.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = prior.blocks[0].up_projection.weight.clone()
    optimizer.step()
    assert torch.equal(prior.blocks[0].attention.qk_gain, torch.ones(2, 12))
    assert torch.allclose(prior.blocks[0].up_projection.weight, 0.95 * before)


def test_without_decay_there_is_one_group() -> None:
    (group,) = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), weight_decay=0.0)
    assert len(group["params"]) == 4
