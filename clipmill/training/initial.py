"""Initialises a training with the weights of an export, which may belong to a different model.

A weight is copied if the new model has one of the same name, shape and meaning. All other weights keep their random
initialisation; the log and ``initial.json`` in the training folder list them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipmill import storage
from clipmill.config import TrainingConfig
from clipmill.training import checkpoint
from clipmill.training.world import World

__all__ = ["Source", "initialise", "initial_facts"]

SCHEMA = 1
_FILE = "initial.json"

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Weights to start from."""

    sha8: str
    """Name of the export."""
    tensors: Mapping[str, Tensor]
    """The weights by name."""
    strange: Mapping[str, str] = {}
    """Prefixes of names whose weights must not be copied even if the size fits, each with the reason."""
    whole: tuple[str, ...] = ()
    """Prefixes of names whose weights are copied all or not at all, because some without the others are useless."""


def initialise(
    model: nn.Module, training: TrainingConfig, folder_url: str, world: World, read: Callable[[str], Source]
) -> None:
    """Gives a fresh model the weights that ``training.init_from`` names, unless the training resumes. Collective.

    Args:
        model: randomly initialised; weights that are not copied stay random.
        training: settings of the training.
        folder_url: the training folder; if it has a checkpoint, the training resumes and nothing is copied.
        world: this rank and its peers.
        read: loads the export at a URL.

    Raises:
        UserError: there is no export of this kind.
    """
    url = training.init_from
    if url is None or world.from_rank_zero(lambda: checkpoint.newest(folder_url) is not None):
        return
    source = read(url)
    left = _take(model, source)
    if world.rank == 0:
        num_taken = len(model.state_dict()) - sum(reason.startswith("new: ") for reason in left)
        logger.info("started from %d weights of export %s at %s", num_taken, source.sha8, storage.shown(url))
        for reason in left:
            logger.info("%s", reason)
        facts = {"init_from": storage.shown(url), "init_sha8": source.sha8, "weights_taken": num_taken}
        storage.publish_document(storage.join(folder_url, _FILE), facts | {"weights_not_taken": left}, SCHEMA)


def initial_facts(folder_url: str) -> dict[str, Any]:
    """Which weights a training started from, for its summary; empty if they were random."""
    try:
        facts = storage.read_document(storage.join(folder_url, _FILE), SCHEMA)
    except FileNotFoundError:
        return {}
    return {key: value for key, value in facts.items() if key != "schema"}


@torch.no_grad()
def _take(model: nn.Module, source: Source) -> list[str]:
    """Copies all weights that fit.

    Returns:
        A line for each weight of the model that was not copied, and for each unused weight of the source.
    """
    state = model.state_dict()
    reasons = {name: reason for name in state if (reason := _misfit(name, state[name], source))}
    for prefix in source.whole:
        misfits = [name for name in reasons if name.startswith(prefix)]
        if misfits or any(name.startswith(prefix) for name in source.tensors.keys() - state.keys()):
            because = misfits[0] if misfits else f"the kind of {prefix.rstrip('.')}"
            reasons |= {
                name: f"goes with {because}" for name in state if name.startswith(prefix) and name not in reasons
            }
    for name, tensor in state.items():
        if name not in reasons:
            tensor.copy_(source.tensors[name])
    left_over = sorted(source.tensors.keys() - state.keys())
    return [f"new: {name}: {reasons[name]}" for name in sorted(reasons)] + [f"unused: {name}" for name in left_over]


def _misfit(name: str, tensor: Tensor, source: Source) -> str | None:
    """Why a weight cannot be copied; None if it can."""
    for prefix, reason in source.strange.items():
        if name.startswith(prefix):
            return reason
    if name not in source.tensors:
        return "the export has no such weight"
    there, here = tuple(source.tensors[name].shape), tuple(tensor.shape)
    return None if there == here else f"{there} in the export, {here} here"
