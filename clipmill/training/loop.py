"""The training loop of both models: batches in a fixed order, exact resume, checkpoints, validation, export.

The loader's whole state is the number of steps done: batch k of a run is a pure function of
(data set, seed, k), see ``clipmill/shards/order.py``.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipmill import storage
from clipmill.config import TrainingConfig
from clipmill.errors import Interrupted, StageFailed
from clipmill.lease import Lease
from clipmill.shards.dataset import ShardDataset, eval_batches, train_batches
from clipmill.shards.order import Order, num_streams
from clipmill.training import checkpoint
from clipmill.training.checkpoint import Saver
from clipmill.training.engine import Engine, World, consolidated_state
from clipmill.training.inputs import check_cache, describe_batches
from clipmill.training.resume import resume
from clipmill.training.telemetry import Report, Stopwatch, Telemetry
from clipmill.training.watchdog import Watchdog

__all__ = ["Job", "fit", "learning_rate", "rows_and_accumulation"]

PROBE_CLIPS = 32
"""Whose loss a checkpoint records, so that a conversion to another world size can show that it gives the same."""


@dataclass(frozen=True)
class Job:
    """What a training stage brings to the loop."""

    folder_url: str
    objective: nn.Module
    """See `Engine`: its ``model`` attribute is what gets exported."""
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    """Turns a collated micro-batch into what the objective takes, tensors still on the CPU."""
    train: ShardDataset
    val: ShardDataset
    config: TrainingConfig
    seed: int
    identity: dict[str, Any]
    """Identity keys and data set fingerprints; a resume with others is refused."""
    batch_statistics: bool
    """Whether the model normalises over the clips of a micro-step, so that their number is part of the training."""
    export: Callable[[dict[str, Tensor], int], None]
    """Publishes the model's float32 state dict after so many steps."""
    score_counts: Callable[[dict[str, Tensor]], dict[str, float]] | None = None
    """Scores of the objective's 1-d metrics, summed over a validation: for what no mean of batches gives."""


def fit(job: Job, world: World, lease: Lease | None, report: Report) -> None:
    """Trains from the newest checkpoint, or from the start, to ``config.steps``, then exports. Collective.

    Args:
        job: what to train.
        world: this process among its peers.
        lease: claim on the training folder; only rank 0 needs it.
        report: progress goes there, the wish to stop comes from there.

    Raises:
        Interrupted: a stop was requested; everything up to this step is in a checkpoint.
        UserError: the newest checkpoint belongs to another configuration or data set, or the cache is too small.
        StageFailed: the loss is no longer finite.
    """
    config = job.config
    check_cache(job.train, config, world_size=world.size, local_size=world.local_size)
    if world.rank == 0:
        describe_batches(job.train.manifest, config, world.size)
    rows, accumulation = rows_and_accumulation(config, world.size)
    engine = Engine(job.objective, config, world, rows, accumulation)
    attempt = world.from_rank_zero(lambda: _claim_attempt(job.folder_url, lease))
    state = {
        "identity": job.identity,
        "world_size": world.size,
        "zero_stage": config.zero_stage,
        "rows": rows * world.size,
    }
    first_step, dataset_since = resume(
        engine,
        config,
        job.folder_url,
        state,
        batch_statistics=job.batch_statistics,
        probe=lambda: _validate(job, engine, PROBE_CLIPS).get("loss"),
    )
    state["dataset_since"] = dataset_since
    saver = Saver(world, job.folder_url, attempt, lease, keep_last=config.keep_last, keep_every=config.keep_every)
    watchdog = Watchdog(world, config.hang_seconds)
    telemetry = Telemetry(job.folder_url, attempt, config.steps, report) if world.rank == 0 else None
    try:
        _run_steps(job, engine, first_step, state, saver, watchdog, report, telemetry)
    finally:
        watchdog.close()
        saver.join()
        if telemetry is not None:
            telemetry.close()
    world.from_rank_zero(lambda: _export(job))
    world.leave()


def _run_steps(
    job: Job,
    engine: Engine,
    first_step: int,
    state: dict[str, Any],
    saver: Saver,
    watchdog: Watchdog,
    report: Report,
    telemetry: Telemetry | None,
) -> None:
    config, world = job.config, engine.world
    if first_step >= config.steps:
        return
    streams = num_streams(config.global_batch)
    batches = train_batches(
        job.train,
        Order(job.train.manifest.counts, job.seed, streams, config.shuffle_window),
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=world.rank,
        world_size=world.size,
        first_step=first_step - state["dataset_since"],
        num_workers=config.loader_workers,
    )
    stopwatch = Stopwatch()
    for step in range(first_step, config.steps):
        waiting_since = time.perf_counter()
        micro_batches = next(batches)
        waited_seconds = time.perf_counter() - waiting_since
        sums = _train_step(job, engine, step, micro_batches)
        watchdog.advance()
        stopwatch.add_step(config.global_batch, waited_seconds)
        done = step + 1
        stop = world.any(report.stop_requested)
        last = done == config.steps
        save = stop or last or done % config.checkpoint_every == 0
        if save or done % config.log_every == 0:
            facts = _means(world, sums)
            facts |= engine.grad_norm() | {"lr": learning_rate(config, step)} | stopwatch.facts()
            _check_finite(job, done, facts)
            if telemetry is not None:
                telemetry.log(done, "train", facts)
            stopwatch.reset()
        elif telemetry is not None:
            telemetry.progress(done)
        if last or done % config.val_every == 0:
            with watchdog.paused():
                facts = _validate(job, engine, config.val_clips)
            if telemetry is not None and facts:
                telemetry.log(done, "val", facts)
            stopwatch.reset()
        if save:
            if telemetry is not None:
                telemetry.upload()
            with watchdog.paused():
                saver.save(engine, done, {**state, "probe_loss": _validate(job, engine, PROBE_CLIPS).get("loss")})
                if stop or last:
                    saver.finish()
            stopwatch.reset()
        if stop and not last:
            raise Interrupted(f"stopped after step {done} with a checkpoint; run the same command to go on")


def _train_step(job: Job, engine: Engine, step: int, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One optimizer step; returns weighted sums over this rank's rows, on the device, not yet synchronised."""
    lr = learning_rate(job.config, step)
    sums: dict[str, Tensor] = {}
    for index, micro_batch in enumerate(micro_batches):
        _seed(job.seed, step, index, engine.world.rank)
        batch = _to_device(job.prepare(micro_batch), engine.world.device)
        loss, metrics = engine.micro_step(batch, lr)
        _accumulate(sums, batch["weight"].sum(), {"loss": loss, **metrics})
    return sums


def _seed(*key: int) -> None:
    """Makes dropout and the like a function of the place in the run, so no generator state needs saving."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _accumulate(sums: dict[str, Tensor], weight: Tensor, means: dict[str, Tensor]) -> None:
    for name, mean in means.items():
        sums[name] = sums.get(name, torch.zeros((), device=mean.device)) + mean * weight
    sums["weight"] = sums.get("weight", torch.zeros((), device=weight.device)) + weight


def _means(world: World, sums: dict[str, Tensor]) -> dict[str, float]:
    """The means over all ranks' rows. Collective; waits for the device."""
    names = sorted(sums)
    totals = dict(zip(names, world.sum([sums[name].item() for name in names]), strict=True))
    weight = totals.pop("weight")
    return {name: total / weight for name, total in totals.items()}


def _validate(job: Job, engine: Engine, max_clips: int) -> dict[str, float]:
    """Means over the first clips of the split val; empty when it has none. Collective."""
    num_clips = min(max_clips, job.val.manifest.num_samples)
    if num_clips == 0:
        return {}
    world = engine.world
    batches = eval_batches(
        job.val,
        batch_size=rows_and_accumulation(job.config, world.size)[0],
        rank=world.rank,
        world_size=world.size,
        max_samples=num_clips,
    )
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for collated in batches:
        batch = _to_device(job.prepare(collated), world.device)
        loss, metrics = engine.evaluate(batch)
        for name in [name for name, value in metrics.items() if value.dim()]:
            counts[name] = metrics.pop(name).double() + counts.get(name, 0)
        _accumulate(sums, batch["weight"].sum(), {"loss": loss, **metrics})
    counts = {name: torch.tensor(world.sum(value.tolist())) for name, value in counts.items()}
    return _means(world, sums) | (job.score_counts(counts) if job.score_counts else {})


def _check_finite(job: Job, step: int, facts: dict[str, float]) -> None:
    broken = [f"{name} {facts[name]}" for name in ("loss", "grad_norm") if not math.isfinite(facts.get(name, 0.0))]
    if broken:
        saved = checkpoint.newest(job.folder_url)
        last = f"the last good checkpoint is {saved.url}" if saved else "no checkpoint was written before"
        raise StageFailed(f"step {step} gave {', '.join(broken)}; {last}; lower the learning rate and run again")


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of the step with index ``step``: linear warm-up, then cosine or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * cosine)


def rows_and_accumulation(config: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Clips of a rank's micro-batch, and micro-batches a step. Their product may exceed the share: padding fills up."""
    share = math.ceil(config.global_batch / world_size)
    accumulation = math.ceil(share / (config.micro_batch or share))
    return math.ceil(share / accumulation), accumulation


def _claim_attempt(folder_url: str, lease: Lease | None) -> str:
    """A name no other group of workers has: Ray Train restarts the group under one and the same lease."""
    assert lease is not None  # only the other ranks go without
    for restart in range(10_000):
        attempt = f"{lease.attempt:06d}-{restart:04d}"
        if storage.create_bytes(storage.join(folder_url, "metrics", f"{attempt}.jsonl"), b""):
            return attempt
    raise StageFailed(f"{folder_url} was restarted 10,000 times under one lease")


def _export(job: Job) -> None:
    """Publishes the weights of the newest checkpoint."""
    newest = checkpoint.newest(job.folder_url)
    assert newest is not None  # the loop ends with a checkpoint
    with tempfile.TemporaryDirectory(prefix="clipmill-export-") as folder:
        checkpoint.fetch(newest, Path(folder))
        state = consolidated_state(Path(folder))
    prefix = "model."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    job.export(weights, newest.step)
