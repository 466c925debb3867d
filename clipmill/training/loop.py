"""The training loop of both models: batches in a fixed order, exact resume, checkpoints, validation, export.

The loader's whole state is the number of steps done: batch k of a run is a pure function of
(data set, seed, k), see ``clipmill/shards/order.py``.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipmill import storage
from clipmill.config import TrainingConfig
from clipmill.errors import Interrupted, StageFailed
from clipmill.lease import Lease
from clipmill.shards.dataset import Augment, MixedDataset, ShardDataset, train_batches
from clipmill.training import checkpoint
from clipmill.training.bad_steps import Ledger
from clipmill.training.checkpoint import Saver
from clipmill.training.exports import export_checkpoint
from clipmill.training.inputs import check_cache, describe_batches
from clipmill.training.means import WeightedMeans
from clipmill.training.resume import Start, resume
from clipmill.training.telemetry import Report, Telemetry, require_wandb
from clipmill.training.throughput import Stopwatch, peak_flops
from clipmill.training.validation import Validation, validate
from clipmill.training.watchdog import Watchdog
from clipmill.training.world import World
from clipmill.training.zero.engine import Engine

__all__ = ["Job", "average_weight", "fit", "learning_rate"]

PROBE_CLIPS = 32
"""Whose loss a checkpoint records, so that a conversion to another world size can show that it gives the same."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a training stage brings to the loop."""

    folder_url: str
    objective: nn.Module
    """See `Engine`: its ``model`` attribute is what gets exported. In training its batches say the ``step``, an int."""
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    """Turns a collated micro-batch into what the objective takes, tensors still on the CPU."""
    train: ShardDataset | MixedDataset
    val: ShardDataset | MixedDataset
    config: TrainingConfig
    seed: int
    identity: dict[str, Any]
    """Identity keys and data set fingerprints; a resume with others is refused."""
    batch_statistics: bool
    """Whether the model normalises over the clips of a micro-step, so that their number is part of the training."""
    export: Callable[[dict[str, Tensor], int], str]
    """Publishes the model's float32 state dict after so many steps, and names the export."""
    score_counts: Callable[[dict[str, Tensor]], dict[str, float]] | None = None
    """Scores of the objective's 1-d metrics, summed over a validation: for what no mean of batches gives."""
    tokens_per_clip: int | None = None
    """For the rate in tokens; none of a model that knows only clips."""
    flops_per_clip: Callable[[], float] | None = None
    """Forward and backward, without what checkpointing repeats; asked before the model is partitioned."""
    augment: Augment | None = None
    """Changes the samples that are trained on."""


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
        StageFailed: a bad step ends the run (see `TrainingConfig.bad_steps`), or ten in a row were left out.
    """
    config = job.config
    check_cache(job.train, config, world_size=world.size, local_size=world.local_size)
    if world.rank == 0:
        describe_batches(job.train, config, world.size)
    world.from_rank_zero(lambda: require_wandb(config.wandb_project))
    rows, accumulation = config.rows_and_accumulation(world.size)
    stopwatch = Stopwatch(job.tokens_per_clip, _peak_share_per_clip(job, world))
    engine = Engine(job.objective, config, world, rows, accumulation)
    attempt, num_restarts = world.from_rank_zero(lambda: _claim_attempt(job.folder_url, lease))
    state = {
        "identity": job.identity,
        "world_size": world.size,
        "zero_stage": config.zero_stage,
        "offload": config.offload,
        "rows": rows * world.size,
    }
    start = resume(
        engine,
        config,
        job.folder_url,
        state,
        is_restart=num_restarts > 0,
        batch_statistics=job.batch_statistics,
        probe=lambda: _probe(job, engine, on_batch=lambda: None),
    )
    state["dataset_since"] = start.dataset_since
    saver = Saver(world, job.folder_url, attempt, lease, keep_last=config.keep_last, keep_every=config.keep_every)
    watchdog = Watchdog(world, config.hang_seconds)
    telemetry = None
    if world.rank == 0:
        telemetry = Telemetry(job.folder_url, attempt, config.steps, report, config.wandb_project)
    try:
        with _without_collector():
            _run_steps(job, engine, start, state, saver, watchdog, report, telemetry, stopwatch)
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
    start: Start,
    state: dict[str, Any],
    saver: Saver,
    watchdog: Watchdog,
    report: Report,
    telemetry: Telemetry | None,
    stopwatch: Stopwatch,
) -> None:
    config, world = job.config, engine.world
    if start.step >= config.steps:
        return
    batches = train_batches(
        job.train,
        job.train.order(job.seed, config.global_batch, config.shuffle_window),
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=world.rank,
        world_size=world.size,
        first_step=start.step - start.dataset_since,
        num_workers=config.loader_workers,
        augment=job.augment,
    )
    ledger = Ledger(world, config.bad_steps, job.folder_url, start.skipped_steps)
    stopwatch.reset()
    for step in range(start.step, config.steps):
        waiting_since = time.perf_counter()
        micro_batches = next(batches)
        waited_seconds = time.perf_counter() - waiting_since
        means = _train_step(job, engine, step, micro_batches)
        watchdog.advance()
        stopwatch.add_step(config.global_batch, waited_seconds)
        done = step + 1
        keys = [key for batch in micro_batches for key in batch["key"]]
        ledger.add(done, keys, means.sum_of("loss"), engine.grad_norm, engine.left_out)
        stop = world.any(report.stop_requested)  # two integers over gloo: it waits for hosts, not for devices
        last = done == config.steps
        save = stop or last or done % config.checkpoint_every == 0
        if save or done % config.log_every == 0:
            facts = means.fetch(world)
            ledger.look()  # before a checkpoint could be made of it
            facts |= {"grad_norm": engine.grad_norm.item(), "lr": learning_rate(config, step)} | stopwatch.facts()
            stopwatch.reset()  # recording takes time too, of the next window
            if config.bad_steps == "skip":
                facts["skipped_steps"] = ledger.num_skipped
            if telemetry is not None:
                telemetry.log(done, "train", facts)
        elif telemetry is not None:
            telemetry.progress(done)
        if last or done % config.val_every == 0:
            with engine.averaged():
                result = _validate(job, engine, config.val_clips, watchdog.advance)
            if telemetry is not None and result.scores:
                telemetry.log(done, "val", result.scores)
                if result.picture is not None:
                    telemetry.log_picture(done, "reconstructions", result.picture)
            stopwatch.reset()
        if save:
            if telemetry is not None:
                telemetry.upload()
            moving = {
                "probe_loss": _probe(job, engine, watchdog.advance),
                "usual_norm": engine.usual_norm,
                "skipped_steps": ledger.num_skipped,
            }
            with watchdog.paused():
                saver.save(engine, done, state | moving)
                if stop or last:
                    saver.finish()
                gc.collect()
            stopwatch.reset()
        if stop and not last:
            raise Interrupted(f"stopped after step {done} with a checkpoint; run the same command to go on")


def _train_step(job: Job, engine: Engine, step: int, micro_batches: list[dict[str, Any]]) -> WeightedMeans:
    """One optimizer step; the means over this rank's rows are on the device, not yet waited for."""
    means = WeightedMeans()
    with engine.step(learning_rate(job.config, step), average_weight(job.config, step)):
        for index, micro_batch in enumerate(micro_batches):
            _seed(job.seed, step, index, engine.world.rank)
            batch = engine.to_device(job.prepare(micro_batch) | {"step": step})
            loss, metrics = engine.micro_step(batch)
            means.add(batch["weight"].sum(), {"loss": loss, **metrics})
    return means


def _seed(*key: int) -> None:
    """Makes dropout and the like a function of the place in the run, so no generator state needs saving."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _validate(job: Job, engine: Engine, max_clips: int, on_batch: Callable[[], None]) -> Validation:
    return validate(
        engine,
        job.val,
        job.prepare,
        rows=job.config.rows_and_accumulation(engine.world.size)[0],
        max_clips=max_clips,
        score_counts=job.score_counts,
        on_batch=on_batch,
    )


def _probe(job: Job, engine: Engine, on_batch: Callable[[], None]) -> float | None:
    """Loss on the same few clips, of the weights themselves."""
    return _validate(job, engine, PROBE_CLIPS, on_batch).scores.get("loss")


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Without Python's collector of cycles, whose rounds hold up a step of one rank and so of all."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _peak_share_per_clip(job: Job, world: World) -> float | None:
    """Share of a second that a clip would take all devices at their peak."""
    if world.device.type != "cuda" or job.flops_per_clip is None:
        return None
    name, precision = torch.cuda.get_device_name(world.device), job.config.precision
    peak = peak_flops(name, precision)
    if world.rank == 0:
        known = "unknown: no MFU" if peak is None else f"{peak / 1e12:g} TFLOP/s, what MFU is a share of"
        logger.info("peak of %s in %s: %s", name, precision, known)
    return None if peak is None else job.flops_per_clip() / (peak * world.size)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of the step with index ``step``: linear warm-up, then cosine or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * cosine)


def average_weight(config: TrainingConfig, step: int) -> float:
    """Weight of the newest weights in their average, after the step with index ``step``.

    At first the average follows a tenth of the run so far, so that it forgets the start: it begins as the weights.
    """
    return 0.0 if config.weights_ema is None else max(1 - config.weights_ema, 10 / (10 + step))


def _claim_attempt(folder_url: str, lease: Lease | None) -> tuple[str, int]:
    """A name no other group of workers has, and how many had the lease before: Ray Train restarts them under one."""
    assert lease is not None  # only the other ranks go without
    for restart in range(10_000):
        attempt = f"{lease.attempt:06d}-{restart:04d}"
        if storage.create_bytes(storage.join(folder_url, "metrics", f"{attempt}.jsonl"), b""):
            return attempt, restart
    raise StageFailed(f"{folder_url} was restarted 10,000 times under one lease")


def _export(job: Job) -> None:
    """Publishes the weights of the newest checkpoint."""
    newest = checkpoint.newest(job.folder_url)
    assert newest is not None  # the loop ends with a checkpoint
    export_checkpoint(newest, job.export)
