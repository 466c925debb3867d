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
from clipmill.models.tensor_file import Deferred
from clipmill.shards.dataset import Augment, MixedDataset, ShardDataset, train_batches
from clipmill.training import checkpoint
from clipmill.training.bad_steps import Ledger
from clipmill.training.exports import export_checkpoint
from clipmill.training.inputs import check_cache, describe_batches
from clipmill.training.means import WeightedMeans
from clipmill.training.resume import Start, resume
from clipmill.training.saver import Saver
from clipmill.training.schedule import average_weight, learning_rate
from clipmill.training.telemetry import Report, Telemetry, require_wandb
from clipmill.training.throughput import Stopwatch, peak_share_per_clip
from clipmill.training.validation import Validation, validate
from clipmill.training.watchdog import Watchdog
from clipmill.training.world import World
from clipmill.training.zero.engine import Engine

__all__ = ["Job", "fit"]

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
    export: Callable[[dict[str, Deferred], int], str]
    """Publishes the model's float32 state dict after that number of steps, and names the export."""
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
        report: receives the progress and tells when to stop.

    Raises:
        Interrupted: a stop was requested; everything up to this step is in a checkpoint.
        UserError: the newest checkpoint belongs to another configuration or data set, the cache is too small, or a disk
            is full or read-only.
        StageFailed: a bad step ends the run (see `TrainingConfig.bad_steps`), or ten in a row were skipped.
    """
    config = job.config
    check_cache(job.train, config, world_size=world.size, local_size=world.local_size)
    if world.rank == 0:
        describe_batches(job.train, config, world.size)
    world.from_rank_zero(lambda: require_wandb(config.wandb_project))
    rows, accumulation = config.rows_and_accumulation(world.size)
    stopwatch = Stopwatch(job.tokens_per_clip, peak_share_per_clip(job.flops_per_clip, config, world))
    engine = Engine(job.objective, config, world, rows, accumulation)
    attempt, num_restarts = world.from_rank_zero(lambda: _claim_attempt(job.folder_url, lease))
    state = {
        "identity": job.identity,
        "world_size": world.size,
        "zero_stage": config.zero_stage,
        "offload": config.offload,
        "num_groups": engine.num_groups,
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
            _Steps(job, engine, start, state, saver, watchdog, report, telemetry, stopwatch).run()
    finally:
        watchdog.close()
        saver.join()
        if telemetry is not None:
            telemetry.close()
    world.from_rank_zero(lambda: _export(job))
    world.leave()


class _Steps:
    """The steps of one attempt, and what follows from each: records, validations, checkpoints.

    Until the first step is done a stop ends the process at once: nothing would be lost, and to compile takes minutes.
    From then on it is agreed between the ranks after each step and each batch of a validation; then a checkpoint is
    saved.
    """

    def __init__(
        self,
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
        self._job, self._config, self._engine, self._world = job, job.config, engine, engine.world
        self._start, self._state, self._saver, self._watchdog = start, state, saver, watchdog
        self._report, self._telemetry, self._stopwatch = report, telemetry, stopwatch
        self._ledger = Ledger(self._world, self._config.bad_steps, job.folder_url, start.skipped_steps)
        self._save_due = False
        self._validation_due = start.validation_due
        """A stop skips the validation of its step; the next attempt makes up for it."""

    def run(self) -> None:
        """All steps that are left.

        Raises:
            Interrupted: a stop was requested.
        """
        start, steps = self._start.step, self._config.steps
        batches = self._batches() if start < steps else iter(())
        if self._validation_due:
            self._validate(start)
        with contextlib.ExitStack() as held:
            self._stopwatch.reset()
            for step in range(start, steps):
                self._take_step(step, batches)
                if step == start:
                    held.enter_context(self._report.hold_stops())
                self._after_step(step + 1)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        job, config, world = self._job, self._config, self._world
        return train_batches(
            job.train,
            job.train.order(job.seed, config.global_batch, config.shuffle_window),
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=world.rank,
            world_size=world.size,
            first_step=self._start.step - self._start.dataset_since,
            num_workers=config.loader_workers,
            augment=job.augment,
        )

    def _take_step(self, step: int, batches: Iterator[list[dict[str, Any]]]) -> None:
        waiting_since = time.perf_counter()
        micro_batches = next(batches)
        waited_seconds = time.perf_counter() - waiting_since
        self._means = _train_step(self._job, self._engine, step, micro_batches)
        self._watchdog.advance()
        self._stopwatch.add_step(self._config.global_batch, waited_seconds)
        keys = [key for batch in micro_batches for key in batch["key"]]
        self._ledger.add(step + 1, keys, self._means.sum_of("loss"), self._engine.grad_norm, self._engine.skipped)

    def _after_step(self, done: int) -> None:
        """What is due after a step.

        Raises:
            Interrupted: a stop was requested; the steps so far are in a checkpoint, unless the message says otherwise.
            StageFailed: a bad step ends the run, or the last steps cannot be saved.
        """
        config, last = self._config, done == self._config.steps
        stop = self._stop_agreed()
        begins_save = last or done % config.checkpoint_every == 0
        self._validation_due = last or done % config.val_every == 0
        if stop or begins_save or done % config.log_every == 0:
            self._record(done)
        elif self._save_due:  # put off by an earlier step: is this one good?
            self._ledger.look()
        elif self._telemetry is not None:
            self._telemetry.progress(done)
        self._save_due |= begins_save
        if self._validation_due and not stop:
            self._validate(done)
            stop = self._stop_agreed()
        if stop or self._save_due:
            problem = self._save(done, is_last=stop or last)
            if stop or self._stop_agreed():
                self._end(done, problem)

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop. Two integers over gloo: it waits for hosts, not for devices."""
        return self._world.any(self._report.stop_requested)

    def _record(self, done: int) -> None:
        facts = self._means.fetch(self._world)
        self._ledger.look()  # before a checkpoint could be made of it
        facts |= {"grad_norm": self._engine.grad_norm.item(), "lr": learning_rate(self._config, done - 1)}
        facts |= self._stopwatch.facts()
        self._stopwatch.reset()  # recording takes time too, of the next window
        if self._config.bad_steps == "skip":
            facts["skipped_steps"] = self._ledger.num_skipped
        if self._telemetry is not None:
            self._telemetry.log(done, "train", facts)

    def _validate(self, done: int) -> None:
        """Records scores and picture, unless a stop ends the validation."""

        def on_batch() -> bool:
            self._watchdog.advance()
            return self._stop_agreed()

        with self._engine.averaged():
            result = _validate(self._job, self._engine, self._config.val_clips, on_batch)
        self._stopwatch.reset()
        if result is None:
            return
        self._validation_due = False
        if self._telemetry is not None and result.scores:
            self._telemetry.log(done, "val", result.scores)
            if result.picture is not None:
                self._telemetry.log_picture(done, "reconstructions", result.picture)

    def _save(self, done: int, is_last: bool) -> str | None:
        """Saves a checkpoint, if it would be a good one; else it stays due.

        Returns:
            Why it was not saved; None if it was.

        Raises:
            StageFailed: these were all steps, and it would not be a good one.
        """
        problem, probe_loss = self._ruin(is_last)
        if problem is not None:
            if done == self._config.steps:
                advice = "lower the learning rate and run again"
                raise StageFailed(f"all {done} steps are done, but {problem}; {self._ledger.last_good()}; {advice}")
            if self._world.rank == 0:
                logger.warning(
                    "no checkpoint after step %d, since %s; the next good step makes up for it", done, problem
                )
            return problem
        if self._telemetry is not None:
            self._telemetry.upload()
        moving = {
            "probe_loss": probe_loss,
            "usual_norm": self._engine.usual_norm,
            "skipped_steps": self._ledger.num_skipped,
            "validation_due": self._validation_due,
        }
        with self._watchdog.paused():
            is_staged = self._saver.save(self._engine, done, self._state | moving, is_last=is_last)
            gc.collect()
        self._save_due = False
        self._stopwatch.reset()
        return None if is_staged else "it could not be staged"

    def _ruin(self, is_last: bool) -> tuple[str | None, float | None]:
        """What speaks against saving these weights, if anything does; and their probe loss, if it was computed.

        Steps that are skipped in a row are often what follows from weights that a step has ruined. A single one may be
        the first of them, so a save waits for the next step, if there is one.
        """
        in_a_row = self._ledger.num_in_a_row
        if in_a_row > (1 if is_last else 0):
            return f"the last {in_a_row} steps were skipped", None
        if not self._engine.is_finite():
            return "some weights or optimizer states are not finite", None
        loss = _probe(self._job, self._engine, self._watchdog.advance)
        if loss is not None and not math.isfinite(loss):
            return f"the loss of {PROBE_CLIPS} fixed clips is {loss}", loss
        return None, loss

    def _end(self, done: int, problem: str | None) -> None:
        if problem is None:
            with self._watchdog.paused():
                self._saver.finish()
            raise Interrupted(f"stopped after step {done} with a checkpoint; run the same command to go on")
        raise Interrupted(
            f"stopped after step {done} without a checkpoint, since {problem}; {self._ledger.last_good()}; run the "
            "same command to go on from there"
        )


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


def _validate(job: Job, engine: Engine, max_clips: int, on_batch: Callable[[], bool]) -> Validation | None:
    """Scores and picture of validation clips; None if ``on_batch``, called after each batch, has ended it."""
    return validate(
        engine,
        job.val,
        job.prepare,
        rows=job.config.rows_and_accumulation(engine.world.size)[0],
        max_clips=max_clips,
        score_counts=job.score_counts,
        on_batch=on_batch,
    )


def _probe(job: Job, engine: Engine, on_batch: Callable[[], object]) -> float | None:
    """Loss on the same few clips, of the weights themselves; training clips if there are no others. Part of a save."""

    def go_on() -> bool:
        on_batch()
        return False

    clips = job.val if len(job.val) else job.train
    rows = job.config.rows_and_accumulation(engine.world.size)[0]
    result = validate(engine, clips, job.prepare, rows=rows, max_clips=PROBE_CLIPS, score_counts=None, on_batch=go_on)
    return None if result is None else result.scores.get("loss")


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
