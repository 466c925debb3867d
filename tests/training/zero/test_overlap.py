"""Gradients that are reduced beside the backward pass over gloo are those that DeepSpeed reduces after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipmill.config import TrainingConfig
from clipmill.training.world import World, join_world
from clipmill.training.zero import engine as engine_module
from clipmill.training.zero.engine import Engine
from clipmill.training.zero.overlap import Overlap
from tests.models.processes import run_ranks

DIM, LAYERS, ROWS = 7, 9, 3


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(LAYERS)))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.model(batch["x"]) - batch["y"]).square().mean(), {}


def train(world: World, stage: int, accumulation: int) -> tuple[list[Tensor], list[str]]:
    """Weights after some steps, and what happened in the last one: layers whose gradient is there, and sent buckets."""
    settings = {"global_batch": world.size * ROWS * accumulation, "micro_batch": ROWS, "zero_stage": stage, "lr": 0.01}
    objective = Objective()
    engine = Engine(objective, TrainingConfig.model_validate(settings), world, ROWS, accumulation)
    events: list[str] = []
    for layer in objective.model:
        layer.register_full_backward_hook(lambda *_: events.append("backward"))
    send = dist.all_to_all_single

    def watched(*arguments: Any, **keys: Any) -> Any:
        events.append("sent")
        return send(*arguments, **keys)

    dist.all_to_all_single = watched
    try:
        for step in range(4):
            events.clear()
            with engine.step(lr=0.01, average_weight=0.0):
                for micro_step in range(accumulation):
                    random = torch.Generator().manual_seed(100 * step + 10 * micro_step + world.rank)
                    x = torch.randn(ROWS, DIM, generator=random)
                    engine.micro_step({"x": x, "y": x.flip(1), "weight": torch.ones(ROWS)})
    finally:
        dist.all_to_all_single = send
    return [weight.detach().clone() for weight in objective.parameters()], events


def compare(rank: int, world_size: int) -> None:
    world = join_world()
    for stage, accumulation in ((1, 1), (2, 1), (1, 2), (2, 2)):
        ours, events = train(world, stage, accumulation)
        engine_module.Overlap = lambda optimizer: None  # DeepSpeed's own reduction
        theirs, others = train(world, stage, accumulation)
        engine_module.Overlap = Overlap
        assert "sent" not in others
        last = len(events) - events[::-1].index("backward")
        assert events[:last].count("sent") >= 4, f"what was sent during the backward pass: {events}"
        for a, b in zip(ours, theirs, strict=True):
            # At two ranks a sum has one order.
            torch.testing.assert_close(a, b, rtol=0 if world.size == 2 else 1e-6, atol=0 if world.size == 2 else 1e-7)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_reduced_beside_the_backward_pass_are_the_same(tmp_path: Path, num_ranks: int) -> None:
    run_ranks(compare, num_ranks, tmp_path)
