"""Measures how fast a prior trains.

Two comparisons. Both alternate step by step in one process; the results are medians of ratios.

    loop    tokens/s of our training step (loader, engine at each ZeRO stage, metrics), divided by those of a bare
            PyTorch loop around the same model with fused AdamW and batches in memory. Goal: 0.95 at stage 1. Sizes: 6
            layers x 288, 1,024 tokens, batch 4; on a GPU, where this size only waits for launches, 100m and 48 clips
    model   time of a step of a plain implementation of the published transformer (materialised scores, an L x L float
            mask, norms written out, checkpointing always on, float32), divided by that of ours in float32 and in
            bfloat16. Goal: 3 at 6 layers x 288, 1,024 tokens, batch 4. Ours in bfloat16 is also compared with the
            published model under the same autocast, which its code does not have. On a GPU ours is also compiled

Without a GPU, each ratio is also given in CPU time, which is more reliable on a busy machine. The loop should wait for
data less than 1 % of its time.

On GPUs, the presets (100m, which is 12 layers x 768, 350m, 1b) then run through the loop, compiled, in bfloat16. The
results are tokens/s, the share of the GPUs' peak FLOP/s (MFU; goals on an H100: 40, 46 and 50 %), and memory, which
should be within 10 % of the estimate. The smallest preset also runs without compiling. ZeRO is at stage 1; on one GPU,
where there is nothing to shard, at stage 0.

    OMP_WAIT_POLICY=passive python benchmarks/prior.py [--steps 10] [--precision float32] [--zero-stages 0 1 2 3]
    torchrun --nproc-per-node 8 benchmarks/prior.py --precision bfloat16

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_prior import PublishedPrior
from ranks import launch
from timing import device_name, interleave, ratio
from torch import nn

from clipmill.config import PriorModelConfig, TrainingConfig, load_config
from clipmill.models.prior import Prior
from clipmill.shards.commits import commit_unit
from clipmill.shards.dataset import ShardDataset, decode_codes, train_batches
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest
from clipmill.shards.order import Order, num_streams
from clipmill.training.estimate import estimate
from clipmill.training.job import Job
from clipmill.training.loop import train_step
from clipmill.training.prior import PriorObjective
from clipmill.training.throughput import peak_flops
from clipmill.training.world import World, join_world
from clipmill.training.zero.engine import Engine

SHAPE = (4, 16, 16)
NUM_CODES, CODE_DIM, BATCH = 1024, 256, 4
PRESETS = {"100m": (128, 1), "350m": (56, 2), "1b": (24, 4)}
"""Clips of a GPU's micro-batch, which leave some of 80 GB, and micro-batches a step."""
EAGER = ("100m", 48, 1)
SIZES = {"hidden_dim": 288, "num_heads": 4, "num_layers": 6, "dropout": 0.0, "attention_dropout": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--zero-stages", type=int, nargs="*", default=[1])
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--peak-tflops", type=float, help="of one GPU in bfloat16; none: by its name")
    parser.add_argument("--ranks", type=int, help="compare with DDP and FSDP2 on so many ranks: see ranks.py")
    parser.add_argument("--link-mbit", type=int, help="of the link between these ranks; none: as fast as it goes")
    arguments = parser.parse_args()
    if arguments.ranks is not None:
        launch(arguments.ranks, arguments.link_mbit, arguments.steps, arguments.zero_stages)
    cuda = torch.cuda.is_available()
    peak = (arguments.peak_tflops or known_peak()) if cuda else None
    if cuda and peak is None:
        parser.error(f"the peak of {torch.cuda.get_device_name()} is not known: give --peak-tflops")
    world = join_world()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        tokens = write_tokens(Path(folder))
        result = {
            "benchmark": "prior",
            "device": f"{device_name()} x {world.size}" if cuda else device_name(),
            "precision": arguments.precision,
            "steps": arguments.steps,
            **compare_loops(tokens, world, arguments.zero_stages, arguments.precision, arguments.steps),
            **compare_models(world, arguments.steps),
        }
        if peak is not None:
            result["peak_tflops"] = peak
            result["eager"] = utilise(*EAGER, tokens, world, peak, arguments.steps, compiled=False)
            result["presets"] = {
                preset: utilise(preset, *PRESETS[preset], tokens, world, peak, arguments.steps)
                for preset in arguments.presets
            }
    if world.rank == 0:
        print(json.dumps(result))
    world.leave()


def known_peak() -> float | None:
    """TFLOP/s of this GPU in bfloat16."""
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16")
    return None if peak is None else peak / 1e12


# ---------------------------------------------------------------------------------------------- comparisons


def compare_loops(
    tokens: Manifest, world: World, zero_stages: list[int], precision: str, num_rounds: int
) -> dict[str, Any]:
    """Our loop at each ZeRO stage and a bare one, in turns."""
    cuda = torch.cuda.is_available()
    sizes, rows = ({"preset": EAGER[0]}, EAGER[1]) if cuda else (SIZES, BATCH)
    steps: dict[str, Callable[[], Any]] = {"bare": bare_step(new_prior(world, sizes), rows, precision)}
    loops = {}
    for stage in zero_stages:
        settings = {"global_batch": rows * world.size, "zero_stage": stage, "precision": precision}
        training = TrainingConfig.model_validate(settings if cuda else {**settings, "loader_workers": 0})
        loops[stage] = Loop(tokens, new_prior(world, sizes), training, world)
        steps[f"loop, ZeRO-{stage}"] = loops[stage]
    wall, cpu = interleave(steps, num_rounds, steps_per_round=5 if cuda else 1)
    facts: dict[str, Any] = {
        "loop_seconds_per_step": medians(world, wall, rows),
        "data_wait_share": {stage: round(loop.waited / loop.lasted, 5) for stage, loop in loops.items()},
    }
    for kind, seconds in clocks(wall, cpu).items():
        facts[f"loop_to_bare{kind}"] = {
            stage: ratio(seconds["bare"], seconds[f"loop, ZeRO-{stage}"]) for stage in loops
        }
    return facts


def compare_models(world: World, num_rounds: int) -> dict[str, Any]:
    """Our models and the published one in both precisions, in bare loops, in turns."""
    models = {style: new_prior(world, {"style": style, **SIZES}) for style in ("videogpt", "modern")}
    if torch.cuda.is_available():
        for style in list(models):
            models[f"{style}, compiled"] = model = new_prior(world, {"style": style, **SIZES})
            for block in model.blocks:
                block.compile()
    sizes = PriorModelConfig.model_validate(SIZES)
    published = PublishedPrior(sizes, SHAPE, NUM_CODES, torch.randn(NUM_CODES, CODE_DIM)).to(world.device)
    steps = {
        f"{name}, {precision}": bare_step(model, BATCH, precision)
        for precision in ("float32", "bfloat16")
        for name, model in {**models, "published": published}.items()
    }
    wall, cpu = interleave(steps, num_rounds)
    facts: dict[str, Any] = {"model_seconds_per_step": medians(world, wall, BATCH)}
    for kind, seconds in clocks(wall, cpu).items():
        for suffix, precision in (("", "float32"), ("_in_bfloat16", "bfloat16")):
            facts[f"times_as_fast_as_published{suffix}{kind}"] = {
                name: ratio(seconds[f"published, {precision}"], seconds[name])
                for name in steps
                if not name.startswith("published") and (not suffix or name.endswith(precision))
            }
    return facts


def clocks(wall: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """By the suffix of what is derived from them; CPU seconds say nothing of a GPU."""
    return {"": wall} if torch.cuda.is_available() else {"": wall, "_in_cpu_seconds": cpu}


def medians(world: World, wall: dict[str, list[float]], rows: int) -> dict[str, float]:
    """Seconds of a step, and prints them."""
    found = {name: statistics.median(durations) for name, durations in wall.items()}
    if world.rank == 0:
        for name, median in found.items():
            tokens_per_second = rows * math.prod(SHAPE) / median
            print(f"{name}: {median * 1e3:.0f} ms a step, {tokens_per_second:,.0f} tokens/s", flush=True)
    return {name: round(median, 4) for name, median in found.items()}


def new_prior(world: World, settings: dict[str, Any]) -> Prior:
    torch.manual_seed(0)
    with torch.device(world.device):
        return Prior(PriorModelConfig.model_validate(settings), SHAPE, NUM_CODES, torch.randn(NUM_CODES, CODE_DIM))


def bare_step(model: nn.Module, rows: int, precision: str) -> Callable[[], None]:
    """A training step without anything of ours around the model."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    codes = torch.randint(NUM_CODES, (rows, *SHAPE), device=device)
    bfloat16 = precision == "bfloat16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            loss = model.loss(codes).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Loop:
    """A step of what `clipmill.training.loop` does between two checkpoints.

    Attributes:
        waited: seconds spent on waiting for data.
        lasted: seconds spent in all.
    """

    def __init__(self, tokens: Manifest, prior: Prior, training: TrainingConfig, world: World) -> None:
        dataset = ShardDataset(tokens, decode_codes)
        self._job = Job(
            folder_url="",
            objective=PriorObjective(prior, tokens_per_value=1.0),
            prepare=lambda batch: {"codes": batch["codes"], "weight": batch["weight"]},
            train=dataset,
            val=dataset,
            config=training,
            seed=0,
            identity={},
            batch_statistics=False,
            export=lambda weights, step: "",
        )
        rows, accumulation = training.rows_and_accumulation(world.size)
        self._engine = Engine(self._job.objective, training, world, rows, accumulation)
        self._numbers = iter(range(training.steps))
        self._batches: Iterator[list[dict[str, Any]]] = train_batches(
            dataset,
            Order(tokens.counts, 0, num_streams(training.global_batch), training.shuffle_window),
            global_batch=training.global_batch,
            micro_batch=training.micro_batch,
            rank=world.rank,
            world_size=world.size,
            first_step=0,
            num_workers=training.loader_workers,
        )
        self.waited = self.lasted = 0.0

    def __call__(self) -> None:
        began = time.perf_counter()
        micro_batches = next(self._batches)
        self.waited += time.perf_counter() - began
        train_step(self._job, self._engine, next(self._numbers), micro_batches)
        self.lasted += time.perf_counter() - began


# ------------------------------------------------------------------------------------------------- presets


def utilise(
    preset: str,
    rows: int,
    accumulation: int,
    tokens: Manifest,
    world: World,
    peak_tflops: float,
    num_steps: int,
    compiled: bool = True,
) -> dict[str, Any]:
    """The loop on a preset, its host free to run ahead of the GPU: tokens/s, MFU, memory."""
    training = {
        "precision": "bfloat16",
        "compile": str(compiled).lower(),
        "zero_stage": min(1, world.size - 1),
        "global_batch": rows * accumulation * world.size,
        "micro_batch": rows,
    }
    settings = [f"prior.training.{name}={value}" for name, value in training.items()]
    shape = ["data.clip.num_frames=16", "data.clip.resolution=64", f"vqvae.model.num_codes={NUM_CODES}"]
    config = load_config([], ["root=unused", f"prior.model.preset={preset}", *shape, *settings])
    rates = {"mfu": 1.0, "gpus_per_node": 8, "upload_mb_per_second": 200.0}
    expected = estimate(config, world.size, peak_tflops=peak_tflops, **rates)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device(world.device):
        prior = Prior(config.prior.model, SHAPE, NUM_CODES, None)
    step = Loop(tokens, prior, config.prior.training, world)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    step.waited, began = 0.0, time.perf_counter()
    for _ in range(num_steps):
        step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    tokens_per_second = num_steps * config.prior.training.global_batch * math.prod(SHAPE) / seconds
    states = expected.states[config.prior.training.zero_stage]
    facts = {
        "parameters": expected.num_parameters,
        "compiled": compiled,
        "clips_per_step": config.prior.training.global_batch,
        "zero_stage": config.prior.training.zero_stage,
        "tokens_per_second": round(tokens_per_second),
        "mfu": round(tokens_per_second * expected.flops_per_token / (world.size * peak_tflops * 1e12), 4),
        "data_wait_share": round(step.waited / seconds, 5),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "estimated_gib": round((states.total + expected.activations) / 2**30, 2),
    }
    if world.rank == 0:
        print(
            f"{preset}, {'compiled' if compiled else 'eager'}: {facts['tokens_per_second']:,} tokens/s, MFU "
            f"{facts['mfu']:.1%} of {peak_tflops:g} TFLOP/s, {facts['memory_gib']} GiB (estimated "
            f"{facts['estimated_gib']})",
            flush=True,
        )
    return facts


def write_tokens(folder: Path) -> Manifest:
    staging = folder / "staging"
    staging.mkdir()
    writer = UnitWriter(staging, "tokens", 0, 2**24)
    random = np.random.default_rng(0)
    for index in range(512):
        codes = random.integers(0, NUM_CODES, SHAPE, dtype=np.uint16)
        members = {"codes.npy": npy_bytes(codes), "json": json_bytes({"label": None})}
        writer.add(Sample(f"{index:016x}_000000", members))
    url = str(folder / "tokens")
    commit_unit(url, 0, writer.finish(), {})
    return freeze(url, "tokens", [0], {"num_codes": NUM_CODES, "latent_shape": SHAPE}, {"classes": []})


if __name__ == "__main__":
    main()
