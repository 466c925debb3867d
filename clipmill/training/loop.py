"""The steps of one attempt, with the records, validations and checkpoints between them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from clipmill.errors import Interrupted, StageFailed
from clipmill.models.prior import Prior
from clipmill.shards.dataset import train_batches
from clipmill.training.bad_steps import Ledger
from clipmill.training.job import PROBE_CLIPS, Job, probe
from clipmill.training.means import WeightedMeans
from clipmill.training.previews import Preview, Samples, Stopped
from clipmill.training.resume import Start
from clipmill.training.saver import Saver
from clipmill.training.schedule import average_weight, learning_rate
from clipmill.training.telemetry import Report, Telemetry
from clipmill.training.throughput import Stopwatch, peak_share_per_clip
from clipmill.training.validation import Validation, validate
from clipmill.training.watchdog import Watchdog
from clipmill.training.zero.engine import Engine

__all__ = ["Steps", "train_step"]

logger = logging.getLogger(__name__)


@dataclass
class Steps:
    """The steps of one attempt, with the records, validations and checkpoints between them.

    Until the first step is done, a stop ends the process at once: nothing would be lost, and compilation takes minutes.
    Later, the ranks agree on a stop after each step and after each batch of a validation, and then save a checkpoint.
    """

    job: Job
    engine: Engine
    start: Start
    saver: Saver
    watchdog: Watchdog
    report: Report
    telemetry: Telemetry | None
    """On rank 0."""

    def __post_init__(self) -> None:
        job = self.job
        self._config, self._world = job.config, self.engine.world
        peak_share = peak_share_per_clip(job.flops_per_clip, job.config, self._world)
        self._stopwatch = Stopwatch(job.tokens_per_clip, peak_share)
        self._ledger = Ledger(self._world, job.config.bad_steps, job.folder_url, self.start.skipped_steps)
        self._save_due = False
        self._validation_due = self.start.validation_due
        """Set while a validation is due: a stop skips it, and the next attempt repeats it."""

    def run(self) -> None:
        """All steps that are left.

        Raises:
            Interrupted: a stop was requested.
        """
        start, steps = self.start.step, self._config.steps
        batches = self._batches() if start < steps else iter(())
        if self._validation_due:
            self._validate(start)
        with contextlib.ExitStack() as held:
            self._stopwatch.reset()
            for step in range(start, steps):
                self._take_step(step, batches)
                if step == start:
                    held.enter_context(self.report.hold_stops())
                self._after_step(step + 1)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        job, config, world = self.job, self._config, self._world
        return train_batches(
            job.train,
            job.train.order(job.seed, config.global_batch, config.shuffle_window),
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=world.rank,
            world_size=world.size,
            first_step=self.start.step - self.start.dataset_since,
            num_workers=config.loader_workers,
            augment=job.augment,
        )

    def _take_step(self, step: int, batches: Iterator[list[dict[str, Any]]]) -> None:
        waiting_since = time.perf_counter()
        micro_batches = next(batches)
        waited_seconds = time.perf_counter() - waiting_since
        self._means = train_step(self.job, self.engine, step, micro_batches)
        self.watchdog.advance()
        self._stopwatch.add_step(self._config.global_batch, waited_seconds)
        keys = [key for batch in micro_batches for key in batch["key"]]
        self._ledger.add(step + 1, keys, self._means.sum_of("loss"), self.engine.grad_norm, self.engine.skipped)

    def _after_step(self, done: int) -> None:
        """Does everything that is due after a step.

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
        elif self._save_due:  # an earlier step was bad, which delayed the save
            self._ledger.look()
        elif self.telemetry is not None:
            self.telemetry.progress(done)
        self._save_due |= begins_save
        if self._validation_due and not stop:
            self._validate(done)
            stop = self._stop_agreed()
        if self.job.samples is not None and not stop and (last or done % self.job.samples.every == 0):
            self._show_samples(done, self.job.samples)
            stop = self._stop_agreed()
        if stop or self._save_due:
            problem = self._save(done, is_last=stop or last)
            if stop or self._stop_agreed():
                self._end(done, problem)

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop. Sends two integers over gloo, which does not wait for the GPU."""
        return self._world.any(self.report.stop_requested)

    def _record(self, done: int) -> None:
        facts = self._means.fetch(self._world)
        self._ledger.look()  # a bad step must be found before a checkpoint is saved
        facts |= {"grad_norm": self.engine.grad_norm.item(), "lr": learning_rate(self._config, done - 1)}
        facts |= self._stopwatch.facts()
        self._stopwatch.reset()  # the time that recording takes belongs to the next window
        if self._config.bad_steps == "skip":
            facts["skipped_steps"] = self._ledger.num_skipped
        if self.telemetry is not None:
            self.telemetry.log(done, "train", facts)

    def _validate(self, done: int) -> None:
        """Validates and records scores and picture, unless a stop ends the validation."""

        def on_batch() -> bool:
            self.watchdog.advance()
            return self._stop_agreed()

        with self.engine.averaged():
            result = _validate(self.job, self.engine, self._config.val_clips, on_batch)
        self._stopwatch.reset()
        if result is None:
            return
        self._validation_due = False
        if self.telemetry is not None and result.scores:
            self.telemetry.log(done, "val", result.scores)
            if result.picture is not None:
                self.telemetry.log_preview(done, "reconstructions", Preview(result.picture))

    def _show_samples(self, done: int, samples: Samples) -> None:
        """Rank 0 draws, unless it is asked to stop; the others wait."""

        def on_progress(_: int) -> None:
            if self.report.stop_requested:
                raise Stopped

        with self.watchdog.patient(), self.engine.averaged():
            if self.telemetry is not None:
                preview = samples.make(cast(Prior, self.engine.objective.model), on_progress)
                if preview is not None:
                    self.telemetry.log_preview(done, "samples", preview)
            self._world.barrier()
        self._stopwatch.reset()

    def _save(self, done: int, is_last: bool) -> str | None:
        """Saves a checkpoint if the weights are good; otherwise the save stays due.

        Returns:
            Why it was not saved; None if it was.

        Raises:
            StageFailed: this was the last step, and the weights are not good.
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
        if self.telemetry is not None:
            self.telemetry.upload()
        moving = {
            "probe_loss": probe_loss,
            "usual_norm": self.engine.usual_norm,
            "skipped_steps": self._ledger.num_skipped,
            "validation_due": self._validation_due,
        }
        with self.watchdog.patient():
            is_staged = self.saver.save(self.engine, done, moving, is_last=is_last)
            gc.collect()
        self._save_due = False
        self._stopwatch.reset()
        return None if is_staged else "it could not be staged"

    def _ruin(self, is_last: bool) -> tuple[str | None, float | None]:
        """Why these weights must not be saved (None if they may be), and their probe loss, if it was computed.

        A step that ruins the weights is often followed by skipped steps. After even a single skipped step, a save
        therefore waits for the next step, if there is one.
        """
        in_a_row = self._ledger.num_in_a_row
        if in_a_row > (1 if is_last else 0):
            return f"the last {in_a_row} steps were skipped", None
        if not self.engine.is_finite():
            return "some weights or optimizer states are not finite", None
        loss = probe(self.job, self.engine, self.watchdog.advance)
        if loss is not None and not math.isfinite(loss):
            return f"the loss of {PROBE_CLIPS} fixed clips is {loss}", loss
        return None, loss

    def _end(self, done: int, problem: str | None) -> None:
        if problem is None:
            with self.watchdog.patient():
                self.saver.finish()
            raise Interrupted(f"stopped after step {done} with a checkpoint; run the same command to go on")
        raise Interrupted(
            f"stopped after step {done} without a checkpoint, since {problem}; {self._ledger.last_good()}; run the "
            "same command to go on from there"
        )


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


def train_step(job: Job, engine: Engine, step: int, micro_batches: list[dict[str, Any]]) -> WeightedMeans:
    """One optimizer step. The returned means over this rank's rows are on the device; nothing waits for them."""
    means = WeightedMeans()
    with engine.step(learning_rate(job.config, step), average_weight(job.config, step)):
        for index, micro_batch in enumerate(micro_batches):
            _seed(job.seed, step, index, engine.world.rank)
            batch = engine.to_device(job.prepare(micro_batch) | {"step": step})
            loss, metrics = engine.micro_step(batch)
            means.add(batch["weight"].sum(), {"loss": loss, **metrics})
    return means


def _seed(*key: int) -> None:
    """Seeds torch from the position in the run, so that dropout needs no saved generator state."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
