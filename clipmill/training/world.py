"""The process group of a training: rank, world size, nodes, and control messages between ranks."""

from __future__ import annotations

import bisect
import datetime
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["World", "join_world"]

TIMEOUT_SECONDS = 7200.0
"""Timeout of every collective. It must be longer than two other limits: that of rank 0 for the slowest node's upload,
during which the peers wait in a collective, and that of the watchdog, which names the rank that all wait for. NCCL's
default of ten minutes would end the training without a name."""

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that give a process its place in a group. DeepSpeed looks for MPI unless all five are set."""


class World:
    """This rank and its peers.

    Attributes:
        rank: index of this process among ``size``.
        local_rank: index among the ``local_size`` processes of this machine.
        nodes: the first rank of each machine.
        node: index of this machine in ``nodes``.
        device: of the model.
    """

    def __init__(self, *, is_ours: bool, is_alone: bool = False) -> None:
        self._is_ours, self._is_alone = is_ours, is_alone
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.device = torch.device("cuda", self.local_rank) if _has_cuda() else torch.device("cpu")
        # Control messages use gloo: with NCCL, even one integer would wait for the GPU's stream.
        self._control = dist.new_group(backend="gloo", timeout=_patience()) if self.size > 1 else None
        firsts = [0.0] * self.size
        firsts[self.rank] = float(self.local_rank == 0)
        self.nodes = [rank for rank, first in enumerate(self.sum(firsts)) if first]
        self.node = bisect.bisect_right(self.nodes, self.rank) - 1

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self._control is None:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flags.item())

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sum over all ranks, in float64."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self._control is not None:
            dist.all_reduce(sums, group=self._control)
        return sums.tolist()

    def from_rank_zero(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, on every rank; an error it raises there is raised on every rank."""
        if self._control is None:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except Exception as error:  # otherwise the peers would wait for a broadcast that never comes
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def raise_first(self, error: Exception | None) -> None:
        """Raises the error of the lowest rank that has one, on every rank."""
        errors = [error]
        if self._control is not None:
            errors = [None] * self.size
            dist.all_gather_object(errors, error, group=self._control)
        for first in errors:
            if first is not None:
                raise first

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self._control is not None:
            dist.barrier(group=self._control)

    def leave(self) -> None:
        """Ends the process group, unless Ray Train created it and will end it. Collective.

        If a rank just exited, its connections would break while its peers close theirs, and sometimes a peer aborts.
        """
        if self._is_ours:
            self.barrier()
            dist.destroy_process_group()
        if self._is_alone:  # later trainings and child processes must not look like ranks of this group
            for name in _ENVIRONMENT:
                os.environ.pop(name, None)


def join_world() -> World:
    """Joins the process group of Ray Train or torchrun, or creates a group of one process."""
    cuda = _has_cuda()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    is_alone = "RANK" not in os.environ
    if is_alone:
        os.environ.update(zip(_ENVIRONMENT, ("0", "1", "0", "127.0.0.1", _free_port()), strict=True))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_patience())
    return World(is_ours=is_ours, is_alone=is_alone)


def _has_cuda() -> bool:
    """Whether to compute on a GPU; DeepSpeed decides in the same way."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def _patience() -> datetime.timedelta:
    return datetime.timedelta(seconds=TIMEOUT_SECONDS)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
