"""Finds the tensors that DeepSpeed's optimizer updates, at each ZeRO stage.

At stage 0 these are the parameters. At stages 1 to 3 they are flat float32 copies of this rank's part of all parameters
("masters"), from which the compute weights are recomputed after each step. All of this is private state of DeepSpeed:
tests/training/test_resume.py and zero/test_stages.py cover the stages and fail if it changes.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["masters", "optimizer_states", "owner", "refresh_weights"]

_PART = re.compile(r"(?:.*[/_])?zero_pp_rank_(\d+)_[^/]*")


def owner(file_name: str) -> int | None:
    """The rank that owns a file of a checkpoint, and is the only one to load it. None if every rank loads it."""
    found = _PART.fullmatch(file_name)
    return None if found is None else int(found[1])


def masters(engine: Any) -> list[Tensor]:
    """The float32 tensors that this rank's optimizer updates.

    Args:
        engine: DeepSpeed's.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(engine.module.parameters())
    optimizer = engine.optimizer
    return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


def optimizer_states(engine: Any) -> dict[Tensor, dict[str, Tensor]]:
    """The optimizer's state of each master: ``step``, ``exp_avg``, ``exp_avg_sq``; all of it is in a checkpoint."""
    optimizer = engine.optimizer
    return (optimizer.optimizer if engine.zero_optimization_stage() else optimizer).state


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Recomputes the model's compute weights from the masters, as after a step. Collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # releases small parameters, which stay gathered between steps
        groups = (optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)
        for flat, computing, partitions in zip(*groups, optimizer.fp16_partitioned_groups, strict=True):
            computing.copy_(flat)
            for partition, piece in zip(partitions, optimizer.unflatten(computing, partitions), strict=True):
                partition.data = piece.data
        optimizer.checkpoint_event_epilogue()
