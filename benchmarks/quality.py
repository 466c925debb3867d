"""Compares the quality of our tokenizer and prior with the published code's after equal CPU time, side by side.

It needs the clips of a finished stage `shard` and, for the prior, the tokens of a finished stage `tokenize`. Both
models have the sizes of the config: channels, blocks, latents, codes. The published code (`published_vqvae.py`, with
its own initialisation) runs with its own settings: Adam without clipping, for the tokenizer with a constant rate, for
the prior with a cosine; a commitment of 0.25, pixel variance 0.06, axial attention. Its learning rate is the best of
three, found with the first seed. Ours runs as the config says, with its schedule stretched over the CPU time. The two
run at the same time with one thread each, so that a busy machine affects both alike. The time of validation is not
counted.

    python benchmarks/quality.py ROOT [--config demo] [--cpu-seconds 87.5] [--seeds 0 1 2] [--what vqvae prior] \\
        [--ours style=modern --ours style=videogpt,hidden_dim=48]

`--ours` names a variant of the tokenizer, a comma-separated list of keys of ``vqvae.model``; each is compared.
Goals: an NMSE of at most 0.2 times the published code's on the demo and 0.5 times on the robot set; nats of at most 0.8
times. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from published_prior import PublishedPrior
from published_vqvae import PublishedVQVAE
from timing import device_name
from torch import Tensor, nn

from clipmill.config import RunConfig, TrainingConfig, load_config
from clipmill.evaluation.scores import detail_energies
from clipmill.models.export import load_vqvae
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, to_input, to_pixels
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes, eval_batches
from clipmill.shards.manifest import Manifest
from clipmill.training.schedule import learning_rate

PUBLISHED_PIXEL_VARIANCE = 0.06
RATES = {"vqvae": (7e-4, 2e-3, 5e-3), "prior": (3e-4, 1e-3, 3e-3)}
"""Learning rates of the published code, its own first."""
EVAL_ROWS = 8


class Run(NamedTuple):
    """One training: what a child process needs to know."""

    what: str
    """``vqvae`` or ``prior``."""
    rate: float | None
    """Of the published code; None: ours."""
    seed: int
    config: RunConfig
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="of a run that has clips and, for the prior, tokens")
    parser.add_argument("assignments", nargs="*", help="section.key=value, over the configuration")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--cpu-seconds", type=float, default=87.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--what", nargs="+", choices=RATES, default=["vqvae"])
    parser.add_argument("--ours", action="append", help="a variant: comma-separated KEY=VALUE of vqvae.model")
    arguments = parser.parse_intermixed_args()
    result: dict[str, Any] = {
        "benchmark": "quality",
        "device": device_name(),
        "root": arguments.root,
        "cpu_seconds": arguments.cpu_seconds,
        "seeds": arguments.seeds,
        "assignments": arguments.assignments,
    }
    for what in arguments.what:
        variants = arguments.ours or [""] if what == "vqvae" else [""]
        configs = {variant or "as configured": configured(arguments, variant) for variant in variants}
        result[what] = compare(what, configs, arguments.seeds, arguments.cpu_seconds)
    print(json.dumps(result))


def configured(arguments: argparse.Namespace, variant: str) -> RunConfig:
    own = [f"vqvae.model.{pair}" for pair in variant.split(",") if pair]
    return load_config([arguments.config], [f"root={arguments.root}", *arguments.assignments, *own])


def compare(what: str, configs: dict[str, RunConfig], seeds: list[int], cpu_seconds: float) -> dict[str, Any]:
    """Trains the published code and each variant of ours; the table of their scores."""
    first = next(iter(configs.values()))
    score = {"vqvae": "nmse", "prior": "nats"}[what]
    tried = [train_beside([Run(what, rate, seeds[0], first, cpu_seconds)])[0] for rate in RATES[what]]
    best = min(range(len(tried)), key=lambda number: tried[number][score])
    rate = RATES[what][best]
    print(
        f"{what}: published, rates {dict(zip(RATES[what], [each[score] for each in tried], strict=True))}", flush=True
    )
    rows: dict[str, list[dict[str, float]]] = {"published": [], **{name: [] for name in configs}}
    for seed in seeds:
        for number, (name, config) in enumerate(configs.items()):
            # The published code runs beside the first variant, and again beside the others only to keep them company.
            runs = [Run(what, None, seed, config, cpu_seconds), Run(what, rate, seed, first, cpu_seconds)]
            ours, published = train_beside(runs)
            rows[name].append(ours)
            if number == 0:
                rows["published"].append(published)
            print(f"{what}, seed {seed}: {name} {ours}, published {published}", flush=True)
    mean = {name: statistics.mean(each[score] for each in found) for name, found in rows.items()}
    ratios = {name: round(mean[name] / mean["published"], 4) for name in configs}
    print_table(what, rows)
    return {"rate_of_published": rate, "rows": rows, f"{score}_to_published": ratios}


def train_beside(runs: list[Run]) -> list[dict[str, float]]:
    """Trains in processes of one thread that run at the same time; the scores of each."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(runs)) as pool:
        return pool.map(train, runs, chunksize=1)


def print_table(what: str, rows: dict[str, list[dict[str, float]]]) -> None:
    columns = list(next(iter(rows.values()))[0])
    print(f"| {what} | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, found in rows.items():
        cells = []
        for column in columns:
            values = [each[column] for each in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g} +- {spread:.2g}")
        print(f"| {name} | " + " | ".join(cells) + " |")


# ------------------------------------------------------------------------------------------------ one training


def train(run: Run) -> dict[str, float]:
    """Trains for the CPU seconds of its run, then validates."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    return train_vqvae(run) if run.what == "vqvae" else train_prior(run)


def train_vqvae(run: Run) -> dict[str, float]:
    train_clips, val_clips = (read(run.config, "clips", split) for split in ("train", "val"))
    variance = float(Manifest.load(run.config.folder("clips", "train"), "clips").facts["pixel_variance"])
    config = run.config.vqvae
    if run.rate is None:
        model: nn.Module = VQVAE(config.model, variance)
    else:
        plain = config.model.model_copy(update={"commitment_cost": 0.25})
        model = PublishedVQVAE(plain, PUBLISHED_PIXEL_VARIANCE)
        model.start_as_released()

    def loss_of(clips: Tensor) -> Tensor:
        output = model(to_input(clips))
        return output if isinstance(output, Tensor) else output.loss

    steps = train_for(run, model, loss_of, train_clips, config.training)
    model.eval()
    error, detail, real_detail = 0.0, 0, 0
    with torch.no_grad():
        for clips in val_clips.split(EVAL_ROWS):
            video = to_input(clips)
            copies = to_pixels(model.decode(model.encode(video)))
            error += (clips.double() - copies.double()).square().sum().item()
            detail += int(detail_energies(copies).sum())
            real_detail += int(detail_energies(clips).sum())
    nmse = error / val_clips.numel() / val_clips.double().var(correction=0).item()
    return {"nmse": round(nmse, 5), "high_frequency_energy": round(detail / real_detail, 4), "steps": steps}


def train_prior(run: Run) -> dict[str, float]:
    train_codes, val_codes = (read(run.config, "tokens", split) for split in ("train", "val"))
    tokenizer, *_ = load_vqvae(run.config.tokenizer_url)
    recipe = Manifest.load(run.config.folder("tokens", "train"), "tokens").recipe
    config, shape, num_codes = run.config.prior, tuple(recipe["latent_shape"]), recipe["num_codes"]
    model_config = config.model.model_copy(update={"class_conditional": False, "condition": None})
    codebook = tokenizer.quantizer.codebook
    if run.rate is None:
        model: Any = Prior(model_config, shape, num_codes, codebook)
    else:
        model = PublishedPrior(model_config, shape, num_codes, codebook)
    steps = train_for(run, model, lambda codes: model.loss(codes.long()).mean(), train_codes, config.training)
    model.eval()
    with torch.no_grad():
        losses = [model.loss(codes.long()).flatten() for codes in val_codes.split(EVAL_ROWS)]
    return {"nats": round(torch.cat(losses).mean().item(), 5), "steps": steps}


def train_for(
    run: Run, model: nn.Module, loss_of: Callable[[Tensor], Tensor], rows: Tensor, training: TrainingConfig
) -> int:
    """Steps until the CPU seconds are spent; how many there were."""
    if run.rate is None:
        settings: dict[str, Any] = {"betas": training.betas, "weight_decay": training.weight_decay, "fused": True}
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, **settings)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=run.rate)
    generator = torch.Generator().manual_seed(run.seed)
    queue: list[int] = []
    used, steps = 0.0, 0
    while used < run.cpu_seconds:
        if len(queue) < training.global_batch:
            queue += torch.randperm(len(rows), generator=generator).tolist()
        batch, queue = rows[queue[: training.global_batch]], queue[training.global_batch :]
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate_after(run, training, used / run.cpu_seconds)
        loss_of(batch).backward()
        if run.rate is None and training.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        used += time.process_time() - began
        steps += 1
    return steps


def rate_after(run: Run, training: TrainingConfig, share: float) -> float:
    """Learning rate once this share of the CPU seconds is spent."""
    if run.rate is None:
        return learning_rate(training, math.floor(share * training.steps))
    return run.rate if run.what == "vqvae" else run.rate * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def read(config: RunConfig, kind: str, split: str) -> Tensor:
    """All clips uint8 [N, T, H, W, 3], or all codes [N, t, h, w]."""
    manifest = Manifest.load(config.folder(kind, split), kind)
    decode, field = (decode_clip, "video") if kind == "clips" else (decode_codes, "codes")
    batches = eval_batches(ShardDataset(manifest, decode), batch_size=64, rank=0, world_size=1)
    rows = [batch[field][batch["weight"] > 0] for batch in batches]
    return torch.from_numpy(np.concatenate([np.asarray(each) for each in rows]))


if __name__ == "__main__":
    main()
