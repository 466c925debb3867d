"""Whether a prior learns what there is to learn."""

from __future__ import annotations

import math

import pytest
import torch

from clipmill.config import PriorModelConfig
from clipmill.models.prior import Prior

SHAPE, NUM_CODES = (2, 4, 4), 16
styles = pytest.mark.parametrize("style", ["videogpt", "modern"])


def trained(codes: torch.Tensor, label: torch.Tensor | None, steps: int, style: str) -> Prior:
    config = PriorModelConfig(
        style=style,
        hidden_dim=48,
        num_heads=4,
        num_layers=2,
        dropout=0.0,
        attention_dropout=0.0,
        class_conditional=label is not None,
    )
    torch.manual_seed(0)
    prior = Prior(config, SHAPE, NUM_CODES, torch.randn(NUM_CODES, 8), 0 if label is None else int(label.max()) + 1)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = prior.loss(codes, label).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prior.eval()


@torch.no_grad()
def bits_per_token(prior: Prior, codes: torch.Tensor, label: torch.Tensor | None) -> float:
    return prior.loss(codes, label).mean().item() / math.log(2)


@pytest.mark.slow
@styles
def test_it_overfits_eight_clips(style: str) -> None:
    torch.manual_seed(1)
    codes = torch.randint(NUM_CODES, (8, *SHAPE))
    # One clip must begin by chance: log2(8) bits spread over its tokens cannot be learnt away. A first code of its own
    # for each would only move them.
    chance = 3 / math.prod(SHAPE)
    bits = bits_per_token(trained(codes, None, 600, style), codes, None)
    assert bits < chance + 0.05
    label = torch.arange(8)
    bits = bits_per_token(trained(codes, label, 600, style), codes, label)
    assert bits < 0.05


@styles
def test_classes_save_the_bits_that_they_tell(style: str) -> None:
    """Each class paints its own code all over: without it, log2(4) bits a clip are left to chance."""
    label = torch.arange(4).repeat(4)
    codes = label.view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    told = bits_per_token(trained(codes, label, 120, style), codes, label)
    guessed = bits_per_token(trained(codes, None, 120, style), codes, None)
    assert told * math.prod(SHAPE) < 0.5
    assert guessed * math.prod(SHAPE) > 1.95
