"""Within a step the host asks the device for nothing, so that it can run ahead of a GPU.

Seen on a CPU by what would wait on a GPU: values that become Python numbers, sizes that depend on values, and calls of
DeepSpeed's ``synchronize``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipmill.config import PriorModelConfig, SharpnessConfig, TrainingConfig, VQVAEModelConfig
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.training.job import Job
from clipmill.training.loop import train_step
from clipmill.training.prior import PriorObjective
from clipmill.training.sharpness import Sharpness
from clipmill.training.vqvae import VQVAEObjective
from clipmill.training.world import World, join_world
from clipmill.training.zero.engine import Engine
from tests.models.processes import run_ranks

WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


class Watch(TorchDispatchMode):
    """Keeps the names of operations that would wait."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in WAITS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def of_prior() -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    config = PriorModelConfig(style="modern", hidden_dim=16, num_heads=2, num_layers=2, dropout=0.1)
    objective = PriorObjective(Prior(config, (1, 4, 4), 8, None), 1.0)
    return objective, lambda: {"codes": torch.randint(8, (2, 1, 4, 4)), "weight": torch.ones(2)}


def of_vqvae() -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    config = VQVAEModelConfig(hidden_dim=8, num_res_layers=1, embedding_dim=4, num_codes=16)
    objective = VQVAEObjective(VQVAE(config, 0.1), Sharpness(SharpnessConfig(), torch.device("cpu")))
    return objective, lambda: {
        "video": torch.randint(256, (2, 4, 16, 16, 3), dtype=torch.uint8),
        "weight": torch.ones(2),
    }


def waits_of_steps(world: World, zero_stage: int, kind: str) -> list[str]:
    torch.manual_seed(0)
    objective, batch = of_prior() if kind == "prior" else of_vqvae()
    settings = {"bad_steps": "skip", "spike_factor": 5.0, "weights_ema": 0.9, "precision": "bfloat16"}
    config = TrainingConfig.model_validate({"global_batch": 8, "micro_batch": 2, "zero_stage": zero_stage, **settings})
    engine = Engine(objective, config, world, 2, 2)
    job = Job("", objective, dict, None, None, config, 0, {}, False, lambda weights, step: "")  # type: ignore[arg-type]
    seen: list[str] = []
    get_accelerator().synchronize = lambda *_: seen.append("synchronize")
    for step in range(6):
        micro_batches = [batch() for _ in range(2)]
        if step == 4:  # DeepSpeed's timers begin with the third step
            seen.clear()
        with Watch(seen):
            train_step(job, engine, step, micro_batches)
    with Watch(found := []):
        engine.grad_norm.item()
    assert found, "the watch sees nothing"
    return seen


CASES = [(zero_stage, kind) for zero_stage in (0, 1, 2) for kind in ("prior", "vqvae")]


def waits(rank: int, world_size: int) -> list[list[str]]:
    world = join_world()
    return [waits_of_steps(world, *case) for case in CASES]


def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    for found in run_ranks(waits, 2, tmp_path):
        assert dict(zip(CASES, found, strict=True)) == {case: [] for case in CASES}
