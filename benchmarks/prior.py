"""How fast does a prior train?

Two comparisons, each interleaved step by step in one process, medians of the ratios:

    loop    tokens/s of our training step (loader, engine at each ZeRO stage, metrics) over those of a bare PyTorch loop
            around the same model with AdamW and batches in memory; 0.95 at stage 1 is wanted
    model   time of a step of a plain implementation of the published transformer (scores materialised, an L x L float
            mask, checkpointing always on) over that of ours; 3 is wanted at 6 layers x 288, 1,024 tokens, batch 4

    python benchmarks/prior.py [--steps 10] [--precision float32]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import device_name, interleave, ratio
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipmill.config import PriorModelConfig, TrainingConfig
from clipmill.models.prior import Prior
from clipmill.shards.dataset import ShardDataset, decode_codes, train_batches
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.manifest import Manifest, commit_unit, freeze
from clipmill.shards.order import Order, num_streams
from clipmill.training import loop
from clipmill.training.engine import Engine, join_world
from clipmill.training.prior import PriorObjective

SHAPE = (4, 16, 16)
NUM_CODES, CODE_DIM, BATCH = 1024, 256, 4
SIZES = {"hidden_dim": 288, "num_heads": 4, "num_layers": 6, "dropout": 0.0, "attention_dropout": 0.0}


class PlainBlock(nn.Module):
    """A block as the published code computes it."""

    def __init__(self, dim: int, num_heads: int, length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.register_buffer("mask", torch.ones(length, length).tril())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (part(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(self.mask == 0, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = self.widen(self.norms[1](x))
        return x + self.narrow(y * torch.sigmoid(1.702 * y))


class PlainPrior(nn.Module):
    """The published transformer, every block checkpointed, as its code does by default."""

    def __init__(self) -> None:
        super().__init__()
        dim, length = SIZES["hidden_dim"], int(np.prod(SHAPE))
        self.register_buffer("codebook", torch.randn(NUM_CODES, CODE_DIM))
        self.project = nn.Linear(CODE_DIM, dim, bias=False)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.01)
        self.blocks = nn.ModuleList(PlainBlock(dim, SIZES["num_heads"], length) for _ in range(SIZES["num_layers"]))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, NUM_CODES, bias=False)

    def loss(self, codes: Tensor) -> Tensor:
        codes = codes.flatten(1)
        x = F.pad(self.project(F.embedding(codes, self.codebook))[:, :-1], (0, 0, 1, 0)) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.head(self.norm(x)).transpose(1, 2), codes, reduction="none").mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--zero-stages", type=int, nargs="*", default=[1])
    arguments = parser.parse_args()
    world = join_world()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        tokens = write_tokens(Path(folder))
        bare = bare_step(new_prior("videogpt").to(world.device), arguments.precision)
        steps: dict[str, Callable[[], Any]] = {"bare": bare}
        for stage in arguments.zero_stages:
            steps[f"loop, ZeRO-{stage}"] = loop_step(tokens, stage, arguments.precision)
        steps["bare, modern"] = bare_step(new_prior("modern").to(world.device), arguments.precision)
        steps["bare, published"] = bare_step(PlainPrior().to(world.device), arguments.precision)
        seconds = interleave(steps, arguments.steps)
    for name, durations in seconds.items():
        median = statistics.median(durations)
        print(f"{name}: {median * 1e3:.0f} ms a step, {BATCH * np.prod(SHAPE) / median:,.0f} tokens/s")
    result: dict[str, Any] = {
        "benchmark": "prior",
        "device": device_name(),
        "precision": arguments.precision,
        "steps": arguments.steps,
        "seconds_per_step": {name: round(statistics.median(durations), 4) for name, durations in seconds.items()},
        "loop_to_bare": {
            str(stage): ratio(seconds["bare"], seconds[f"loop, ZeRO-{stage}"]) for stage in arguments.zero_stages
        },
        "bare_to_published": ratio(seconds["bare, published"], seconds["bare"]),
        "modern_to_published": ratio(seconds["bare, published"], seconds["bare, modern"]),
    }
    print(json.dumps(result))


def new_prior(style: str) -> Prior:
    torch.manual_seed(0)
    config = PriorModelConfig.model_validate({"style": style, **SIZES})
    return Prior(config, SHAPE, NUM_CODES, torch.randn(NUM_CODES, CODE_DIM))


def bare_step(model: nn.Module, precision: str) -> Callable[[], None]:
    """A training step without anything of ours around the model."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device.type == "cuda")
    codes = torch.randint(NUM_CODES, (BATCH, *SHAPE), device=device)
    bfloat16 = precision == "bfloat16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            loss = model.loss(codes).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def loop_step(tokens: Manifest, zero_stage: int, precision: str) -> Callable[[], None]:
    """What `clipmill.training.loop` does between two checkpoints."""
    training = TrainingConfig.model_validate(
        {"global_batch": BATCH, "zero_stage": zero_stage, "precision": precision, "loader_workers": 0}
    )
    dataset = ShardDataset(tokens, decode_codes)
    job = loop.Job(
        folder_url="",
        objective=PriorObjective(new_prior("videogpt")),
        prepare=lambda batch: {"codes": batch["codes"], "weight": batch["weight"]},
        train=dataset,
        val=dataset,
        config=training,
        seed=0,
        identity={},
        batch_statistics=False,
        export=lambda weights, step: None,
    )
    engine = Engine(job.objective, training, join_world(), rows=BATCH, accumulation=1)
    numbers = iter(range(training.steps))
    batches: Iterator[list[dict[str, Any]]] = train_batches(
        dataset,
        Order(tokens.counts, 0, num_streams(BATCH), training.shuffle_window),
        global_batch=BATCH,
        micro_batch=None,
        rank=0,
        world_size=1,
        first_step=0,
        num_workers=0,
    )
    return lambda: loop._train_step(job, engine, next(numbers), next(batches))


def write_tokens(folder: Path) -> Manifest:
    staging = folder / "staging"
    staging.mkdir()
    writer = UnitWriter(staging, "tokens", 0, 2**24)
    random = np.random.default_rng(0)
    for index in range(64):
        codes = random.integers(0, NUM_CODES, SHAPE, dtype=np.uint16)
        members = {"codes.npy": npy_bytes(codes), "json": json_bytes({"label": None})}
        writer.add(Sample(f"{index:016x}_000000", members))
    url = str(folder / "tokens")
    commit_unit(url, 0, writer.finish(), {})
    return freeze(url, "tokens", [0], {"num_codes": NUM_CODES, "latent_shape": SHAPE}, {"classes": []})


if __name__ == "__main__":
    main()
