"""The training loop of both models: batches in a fixed order, exact resume, checkpoints, validation, export.

The loader's whole state is the number of steps done: batch k of a run is a pure function of
(data set, seed, k), see ``clipmill/shards/order.py``.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from clipmill import storage
from clipmill.errors import StageFailed
from clipmill.lease import Lease
from clipmill.training import checkpoint
from clipmill.training.exports import export_checkpoint
from clipmill.training.inputs import check_cache, describe_batches
from clipmill.training.job import Job, probe
from clipmill.training.loop import Steps
from clipmill.training.resume import resume
from clipmill.training.saver import Saver
from clipmill.training.telemetry import Report, Telemetry, require_wandb
from clipmill.training.watchdog import Watchdog
from clipmill.training.world import World
from clipmill.training.zero.engine import Engine

__all__ = ["fit"]


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
    engine = Engine(job.objective, config, world, rows, accumulation)
    attempt, num_restarts = world.from_rank_zero(lambda: _claim_attempt(job.folder_url, lease))
    state = _state(job, engine, rows)
    start = resume(
        engine,
        config,
        job.folder_url,
        state,
        is_restart=num_restarts > 0,
        batch_statistics=job.batch_statistics,
        probe=lambda: probe(job, engine, on_batch=lambda: None),
    )
    state["dataset_since"] = start.dataset_since
    watchdog = Watchdog(world, config.hang_seconds)
    saver = Saver(
        world,
        job.folder_url,
        attempt,
        lease,
        state,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        on_progress=watchdog.advance,
    )
    made: list[Telemetry] = []
    world.from_rank_zero(lambda: made.append(Telemetry(job.folder_url, attempt, config, report, job.studio)))
    telemetry = made[0] if made else None
    try:
        with _without_collector():
            Steps(job, engine, start, saver, watchdog, report, telemetry).run()
        with watchdog.patient():
            world.from_rank_zero(lambda: _export(job))
    finally:
        watchdog.close()
        saver.join()
        if telemetry is not None:
            telemetry.close()
    world.leave()


def _state(job: Job, engine: Engine, rows: int) -> dict[str, Any]:
    """What a checkpoint records for a resume to compare."""
    return {
        "identity": job.identity,
        "world_size": engine.world.size,
        "zero_stage": job.config.zero_stage,
        "offload": job.config.offload,
        "num_groups": engine.num_groups,
        "rows": rows * engine.world.size,
    }


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Disables Python's cyclic garbage collector during the block: a collection on one rank delays a step on all."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _claim_attempt(folder_url: str, lease: Lease | None) -> tuple[str, int]:
    """A unique name for this group of workers, and how many groups came before it under the same lease.

    Ray Train restarts groups within one lease.
    """
    assert lease is not None  # only ranks other than 0 have none
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
