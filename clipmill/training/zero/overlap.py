"""Reduces gradients over gloo during the backward pass, at ZeRO stages 1 and 2.

With ``overlap_comm``, DeepSpeed reduces each bucket as soon as the backward pass has filled it. On CUDA that happens in
a separate stream. Over gloo it blocks the backward pass, and all ranks receive all gradients. Here, a bucket is sent
while the backward pass fills the next one, and each slice goes only to its owner, which halves the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Overlap"]


@dataclass
class _Flight:
    """A bucket that is being sent.

    Attributes:
        slices: slices of the bucket's gradients, by the rank that owns them; already divided by the number of ranks.
        copies: arguments for DeepSpeed's ``copy_grads_in_partition``, which copies reduced gradients out of the bucket.
    """

    slices: dict[int, list[Tensor]] = field(default_factory=dict)
    copies: list[tuple[Any, ...]] = field(default_factory=list)
    received: Tensor | None = None
    work: Any = None

    def start(self, rank: int, size: int) -> None:
        """Sends each slice to its owner."""
        if not self.slices:
            return
        parts = [part for owner in range(size) for part in self.slices.get(owner, [])]
        sizes = [sum(part.numel() for part in self.slices.get(owner, [])) for owner in range(size)]
        sent = torch.cat([part.view(-1) for part in parts])
        self.received = sent.new_empty(size, sizes[rank])
        self.work = dist.all_to_all_single(self.received.view(-1), sent, [sizes[rank]] * size, sizes, async_op=True)

    def land(self, rank: int, copy: Any) -> None:
        """Waits, and replaces this rank's own slices by the sums."""
        if self.work is not None and self.received is not None:
            self.work.wait()
            sums = self.received.sum(0)
            own = self.slices.get(rank, [])
            for part, total in zip(own, sums.split([part.numel() for part in own]), strict=True):
                part.copy_(total)
        for arguments in self.copies:
            copy(*arguments)


class Overlap:
    """Replaces DeepSpeed's reduction of buckets.

    It overrides private methods of DeepSpeed's optimizer; ``tests/training/zero/test_overlap.py`` fails if they change.

    Args:
        optimizer: DeepSpeed's, of ZeRO stage 1 or 2, with ``overlap_comm`` and without offload.
    """

    def __init__(self, optimizer: Any) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._reduce, self._copy = optimizer.reduce_ipg_grads, optimizer.copy_grads_in_partition
        self._filling, self._flying = _Flight(), _Flight()
        optimizer.use_multi_rank_bucket_allreduce = False  # passes one slice per owner instead of the whole bucket
        optimizer.reduce_ipg_grads = self._reduce_bucket
        optimizer.allreduce_no_retain = self._take
        optimizer.copy_grads_in_partition = self._put_off

    def _reduce_bucket(self, comm_dtype: torch.dtype | None = None) -> None:
        """Starts a bucket and ends the previous one, whose buffer is filled next; without an argument ends both."""
        self._filling = _Flight()
        self._reduce(comm_dtype)
        self._filling.start(self._rank, self._size)
        self._flying.land(self._rank, self._copy)
        self._flying = self._filling
        if comm_dtype is None:
            self._flying.land(self._rank, self._copy)
            self._flying = _Flight()

    def _take(self, slices: list[Tensor], *_: Any, rank: int, **__: Any) -> None:
        self._filling.slices.setdefault(rank, []).extend(slices)

    def _put_off(self, *arguments: Any) -> None:
        self._filling.copies.append(arguments)
