"""Resumes a training: chooses the checkpoint, checks that it fits, and converts it to this world size and ZeRO
stage.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from clipmill import storage
from clipmill.config import TrainingConfig, refused_changes
from clipmill.errors import StageFailed, UserError
from clipmill.metrics import read_metrics
from clipmill.models.export import read_latest
from clipmill.training import checkpoint
from clipmill.training.checkpoint import Checkpoint
from clipmill.training.saver import staging_folder
from clipmill.training.zero.engine import Engine
from clipmill.training.zero.partitions import owner

__all__ = ["Start", "resume"]

CONTINUITY = 1e-3
"""Largest relative change of the loss on the same clips; mixed-up weights change it far more, bfloat16 less."""

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a training continues."""

    step: int = 0
    """Number of steps done."""
    dataset_since: int = 0
    """The step at which this data set began; its loader counts from there."""
    skipped_steps: int = 0
    """Number of these steps that were skipped."""
    validation_due: bool = False
    """Whether a stop cut the validation of the last step."""


def resume(
    engine: Engine,
    config: TrainingConfig,
    folder_url: str,
    state: dict[str, Any],
    *,
    is_restart: bool,
    batch_statistics: bool,
    probe: Callable[[], float | None],
) -> Start:
    """Restores the checkpoint that ``config.resume`` asks for. Collective.

    Args:
        engine: before its first step.
        config: training settings.
        folder_url: the training folder.
        state: what this run would save: ``identity``, ``world_size``, ``zero_stage``, ``offload``, and ``rows`` of a
            micro-step over all ranks.
        is_restart: this run began before and its ranks were replaced, so the folder may have checkpoints of this run.
        batch_statistics: the model normalises over these rows, so their number must stay the same.
        probe: returns the loss on a few fixed clips; None if there are no clips.

    Raises:
        UserError: the checkpoint belongs to another configuration or data set; ``config.resume`` names one that does
            not exist or has already done all steps; or this folder has an export but no checkpoints.
        StageFailed: the converted weights give another loss.
    """
    world = engine.world
    wish = "auto" if is_restart and config.resume == "never" else config.resume
    found = world.from_rank_zero(lambda: _find(wish, folder_url, config.steps))
    if found is None:
        if world.rank == 0 and not is_restart:
            _warn_of_lost_checkpoints(folder_url)
        return Start()
    _compare(found, state, batch_statistics, config.accept_new_dataset)
    # `offload` is part of the layout because a loaded checkpoint brings its clipping along: after a change, gradients
    # would be clipped twice (by DeepSpeed and by `Guard`) or not at all. Old checkpoints, which do not record it, were
    # clipped by DeepSpeed.
    layout = {"num_groups": 1, **found.state}  # old checkpoints, which do not record it, have one group
    same_layout = all(layout.get(key) == state[key] for key in ("world_size", "zero_stage", "offload", "num_groups"))
    _load(engine, found, folder_url, same_layout)
    dataset_since = _dataset_since(found, state["identity"], is_first=world.rank == 0)
    if not same_layout and dataset_since < found.step:  # on another data set, the losses are not comparable
        _check_continuity(found, probe())
    if world.rank == 0:
        how = (
            "" if same_layout else " converted from {world_size} ranks at ZeRO stage {zero_stage}".format(**found.state)
        )
        logger.info("resumed from step %d (%s)%s", found.step, found.url, how)
    is_own = found.url.startswith(storage.join(folder_url, "checkpoints"))
    validation_due = is_own and found.state.get("validation_due", False)
    return Start(found.step, dataset_since, found.state.get("skipped_steps", 0), validation_due)


def _load(engine: Engine, found: Checkpoint, folder_url: str, same_layout: bool) -> None:
    world = engine.world
    folder = staging_folder(folder_url, world.node)
    if world.local_rank == 0:  # once per node
        shutil.rmtree(folder, ignore_errors=True)
        local_ranks = range(world.rank, world.rank + world.local_size)
        checkpoint.fetch(found, folder, lambda name: not same_layout or owner(name) in (None, *local_ranks))
    world.barrier()
    if same_layout:
        engine.load(folder)
    else:
        engine.load_converted(folder, found.state["zero_stage"])
    engine.usual_norm = found.state.get("usual_norm")  # old checkpoints do not record it
    world.barrier()
    if world.local_rank == 0:
        shutil.rmtree(folder)


def _dataset_since(found: Checkpoint, identity: dict[str, Any], is_first: bool) -> int:
    if not refused_changes(found.state["identity"], identity, accept_new_dataset=False):
        return found.state.get("dataset_since", 0)  # old checkpoints, which do not record it, saw one data set
    if is_first:
        logger.warning("another data set than that of %s: its first epoch starts at step %d", found.url, found.step)
    return found.step


def _find(wish: str, folder_url: str, steps: int) -> Checkpoint | None:
    own = checkpoint.newest(folder_url)
    if wish == "never" and own is not None:
        raise UserError(
            f"training.resume=never, but {folder_url} holds a checkpoint of step {own.step}; take another root, or "
            "resume=auto to go on"
        )
    if own is not None:
        return own  # even if a URL is named: this run has already started from there
    if wish in ("auto", "never"):
        _refuse_to_replace(folder_url, wish)
        return None
    found = checkpoint.newest(wish)
    if found is None:
        raise UserError(f"training.resume names {wish}, which holds no committed checkpoint; name a training folder")
    if found.step >= steps:
        raise UserError(
            f"training.resume names {wish}, whose checkpoint has {found.step} steps behind it, and training.steps is "
            f"{steps}; raise training.steps to go on from there"
        )
    return found


def _refuse_to_replace(folder_url: str, wish: str) -> None:
    """Refuses to restart beside an export: after the same number of steps, the new one would replace it as latest."""
    latest = read_latest(folder_url)
    if latest is not None:
        raise UserError(
            f"{folder_url} has an export of step {latest[0]['step']} and no checkpoint to go on from (training.resume="
            f"{wish}), so the training would start from scratch; restore {folder_url}/checkpoints, take another root, "
            f"or remove {folder_url}/exports"
        )


def _warn_of_lost_checkpoints(folder_url: str) -> None:
    records = read_metrics(folder_url)
    if records:
        logger.warning(
            "%s has metrics up to step %d and no checkpoint: the training begins at step 0",
            folder_url,
            records[-1]["step"],
        )


def _compare(found: Checkpoint, state: dict[str, Any], batch_statistics: bool, accept_new_dataset: bool) -> None:
    changes = refused_changes(found.state["identity"], state["identity"], accept_new_dataset)
    if changes:
        raise UserError(
            f"checkpoint {found.url} was written with other settings: {', '.join(changes)}; restore them, or take "
            "another root"
        )
    if batch_statistics and found.state["rows"] != state["rows"]:
        raise UserError(
            f"checkpoint {found.url} normalised over {found.state['rows']} clips at a time (micro-batch x workers), "
            f"this run would over {state['rows']}; choose training.micro_batch and cluster.training_workers accordingly"
        )


def _check_continuity(found: Checkpoint, loss: float | None) -> None:
    before = found.state["probe_loss"]
    if before is not None and loss is not None and not math.isclose(before, loss, rel_tol=CONTINUITY):
        raise StageFailed(
            f"checkpoint {found.url} gave loss {before} when it was saved and {loss} once converted; start this run "
            f"with {found.state['world_size']} workers and zero_stage={found.state['zero_stage']} as it was written"
        )
