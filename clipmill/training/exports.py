"""Exports of committed checkpoints: at the end of a training, or by `clipmill export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipmill.config import TrainingConfig, refused_changes
from clipmill.errors import UserError
from clipmill.models.tensor_file import Deferred
from clipmill.scratch import ScratchFolder
from clipmill.training import checkpoint
from clipmill.training.checkpoint import Checkpoint
from clipmill.training.zero.engine import whole_state

__all__ = ["export_checkpoint", "find_checkpoint"]


def find_checkpoint(
    folder_url: str, step: int | None, identity: dict[str, Any], training: TrainingConfig
) -> Checkpoint:
    """A committed checkpoint of a training folder.

    Args:
        folder_url: the training folder.
        step: number of steps of the checkpoint; None takes the newest.
        identity: of the training as configured now.
        training: settings of the training.

    Raises:
        UserError: there is no such checkpoint, or it was trained with other identity keys or on other data.
    """
    found = checkpoint.list_checkpoints(folder_url)
    wanted = [one for one in found if step in (None, one.step)]
    if not wanted:
        steps = ", ".join(str(one.step) for one in found) or "none"
        asked = "" if step is None else f" of step {step}"
        raise UserError(f"no checkpoint{asked} in {folder_url}; there are: {steps}")
    if changes := refused_changes(wanted[-1].state["identity"], identity, training.accept_new_dataset):
        raise UserError(f"checkpoint {wanted[-1].url} has other settings: {', '.join(changes)}; name its own config")
    return wanted[-1]


def export_checkpoint(found: Checkpoint, export: Callable[[dict[str, Deferred], int], str]) -> str:
    """Exports a checkpoint, with its averaged weights if it has them.

    Args:
        found: the checkpoint.
        export: takes the model's float32 state dict and the number of steps, publishes them, returns the export's name.
    """
    prefix = "model."
    with ScratchFolder("export") as folder:
        checkpoint.fetch(found, folder)
        state = whole_state(folder, found.state["zero_stage"])
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        return export(weights, found.step)
