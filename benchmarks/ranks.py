"""Compares steps of our engine at each ZeRO stage with PyTorch's DDP and FSDP2 on one model, alternating in one run.

    python benchmarks/prior.py --ranks 2 [--link-mbit 300] [--steps 10] [--zero-stages 0 1 2 3]

starts the ranks; without GPUs, each has one thread and uses gloo. With ``--link-mbit`` they run in a network namespace
whose loopback has that rate, which needs root. The last line is JSON: the speed of each relative to DDP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import device_name, interleave, ratio
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from clipmill.config import PriorModelConfig, TrainingConfig
from clipmill.models.prior import Prior
from clipmill.training.prior import PriorObjective
from clipmill.training.world import World, join_world
from clipmill.training.zero.engine import Engine

__all__ = ["launch"]

SHAPE, NUM_CODES, CODE_DIM, ROWS = (4, 16, 16), 1024, 256, 4
SIZES = {"hidden_dim": 288, "num_heads": 4, "num_layers": 6, "dropout": 0.0, "attention_dropout": 0.0}
PRECISION = "bfloat16"


def launch(num_ranks: int, link_mbit: int | None, num_rounds: int, zero_stages: list[int]) -> None:
    """Replaces this process by the launcher of the ranks."""
    place = ["--nproc-per-node", str(num_ranks), "--master-addr", "127.0.0.1", "--master-port", "29511"]
    stages = map(str, zero_stages)
    work = [__file__, "--steps", str(num_rounds), "--link-mbit", str(link_mbit or 0), "--zero-stages", *stages]
    command = [sys.executable, "-m", "torch.distributed.run", *place, *work]
    if link_mbit is not None:
        if os.geteuid():
            sys.exit("--link-mbit makes a network namespace, which needs root: run it with sudo, or leave it out")
        shape = (
            "ip link set lo mtu 1500 up && "
            f'tc qdisc add dev lo root tbf rate {link_mbit}mbit burst 512kb latency 400ms && exec "$@"'
        )
        command = ["unshare", "--net", "bash", "-c", shape, "bash", *command]
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.execvp(command[0], command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--link-mbit", type=int, required=True)
    parser.add_argument("--zero-stages", type=int, nargs="*", required=True)
    arguments = parser.parse_args()
    world = join_world()
    steps = {"DDP": of_torch(world, lambda model: DistributedDataParallel(model)), "FSDP2": of_torch(world, sharded)}
    steps |= {f"ZeRO-{stage}": of_engine(world, stage) for stage in arguments.zero_stages}
    wall, _ = interleave(steps, arguments.steps)
    if world.rank == 0:
        result = {
            "benchmark": "ranks",
            "device": f"{device_name()} x {world.size}",
            "link_mbit": arguments.link_mbit or None,
            "seconds_per_step": {name: round(statistics.median(taken), 3) for name, taken in wall.items()},
            "times_as_fast_as_ddp": {name: ratio(wall["DDP"], taken) for name, taken in wall.items() if name != "DDP"},
        }
        print(json.dumps(result), flush=True)
    world.leave()


class Loss(nn.Module):
    """The mean loss, which DDP and FSDP2 want as a forward pass."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, codes: Tensor) -> Tensor:
        return self.prior.loss(codes).mean()


def new_prior(world: World) -> Prior:
    torch.manual_seed(0)
    with torch.device(world.device):
        return Prior(PriorModelConfig.model_validate(SIZES), SHAPE, NUM_CODES, torch.randn(NUM_CODES, CODE_DIM))


def sharded(model: Loss) -> nn.Module:
    for block in model.prior.blocks:
        fully_shard(block)
    return fully_shard(model)


def of_torch(world: World, wrap: Callable[[Loss], nn.Module]) -> Callable[[], None]:
    """A step of plain PyTorch."""
    model = wrap(Loss(new_prior(world)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    codes = torch.randint(NUM_CODES, (ROWS, *SHAPE), device=world.device)

    def step() -> None:
        with torch.autocast(world.device.type, torch.bfloat16):
            loss = model(codes)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_engine(world: World, zero_stage: int) -> Callable[[], None]:
    """A step of our engine."""
    settings = {"global_batch": ROWS * world.size, "zero_stage": zero_stage, "precision": PRECISION}
    objective = PriorObjective(new_prior(world), tokens_per_value=1.0)
    engine = Engine(objective, TrainingConfig.model_validate(settings), world, ROWS, 1)
    batch: dict[str, Any] = {
        "codes": torch.randint(NUM_CODES, (ROWS, *SHAPE), device=world.device),
        "weight": torch.ones(ROWS, device=world.device),
    }

    def step() -> None:
        with engine.step(lr=3e-4, average_weight=0.0):
            engine.micro_step(batch)

    return step


if __name__ == "__main__":
    main()
