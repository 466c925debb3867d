"""Ends a training that stands still, and says which rank holds it up.

A collective whose peer never comes waits for minutes and then names nobody; a rank that is stuck in its own code, or
stopped, says nothing at all. Here each rank tells the others, from a thread and through a store of their own, how far
it is.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from clipmill.training.world import World

__all__ = ["Watchdog"]

LOOKS = 10
"""How often a rank looks around in ``hang_seconds``."""
ANSWER_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches one rank of several. Making one is collective.

    Args:
        world: this process among its peers.
        hang_seconds: after this time without a step, the process ends itself with status 1: torchrun and Ray Train then
            tear the group down, and Ray Train starts it again from its last checkpoint.
    """

    def __init__(self, world: World, hang_seconds: float) -> None:
        self._rank, self._size, self._hang_seconds = world.rank, world.size, hang_seconds
        self._patience = ANSWER_SECONDS + 3 * hang_seconds / LOOKS
        self._progress, self._paused = 0, False
        self._ended = threading.Event()
        if world.size == 1:  # nobody to wait for
            return
        patience = datetime.timedelta(seconds=ANSWER_SECONDS)
        host = os.environ["MASTER_ADDR"]
        own = dist.TCPStore(host, 0, is_master=True, timeout=patience) if world.rank == 0 else None
        port = world.from_rank_zero(lambda: own.port if own is not None else None)
        self._store = own or dist.TCPStore(host, port, is_master=False, timeout=patience)
        self._tell(0)
        world.barrier()  # from here on every rank has told something
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def advance(self) -> None:
        """A step, or any part of the work that all ranks do together, is done."""
        self._progress += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work of unknown length that has a deadline of its own."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self.advance()

    def close(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def _watch(self) -> None:
        seen, since, look = self._progress, time.monotonic(), 0
        while not self._ended.wait(self._hang_seconds / LOOKS):
            look += 1
            if self._progress != seen or self._paused:
                seen, since = self._progress, time.monotonic()
            hangs = time.monotonic() - since > self._hang_seconds
            # In a thread: while the process with the store is stopped, not even a call with a timeout returns.
            findings: list[str] = []
            threading.Thread(target=self._look, args=(look, hangs, findings), daemon=True).start()
            deadline = time.monotonic() + self._patience
            while hangs and not findings and time.monotonic() < deadline:
                if self._ended.wait(0.1):
                    return
                hangs = self._progress == seen and not self._paused  # it may go on while its peers are asked
            if hangs:
                culprits = findings[0] if findings else "rank 0 does not answer"
                logger.error("no step for %g s on rank %d: %s; ending it", self._hang_seconds, self._rank, culprits)
                os._exit(1)

    def _look(self, look: int, hangs: bool, findings: list[str]) -> None:
        self._tell(look)
        if hangs:
            findings.append(self._blame())

    def _tell(self, look: int) -> None:
        self._store.set(f"rank-{self._rank}", f"{look} {self._progress}")

    def _blame(self) -> str:
        """Who is silent, or else who is behind."""
        before = self._told()
        time.sleep(3 * self._hang_seconds / LOOKS)
        now = self._told()
        silent = [rank for rank, (look, _) in enumerate(now) if rank != self._rank and look == before[rank][0]]
        if silent:
            return f"rank {', '.join(map(str, silent))} does not answer"
        furthest = max(progress for _, progress in now)
        behind = [str(rank) for rank, (_, progress) in enumerate(now) if progress < furthest]
        return f"rank {', '.join(behind)} is behind the others" if behind else "every rank waits at the same place"

    def _told(self) -> list[tuple[int, int]]:
        """(number of the look, progress) of each rank."""
        pairs = (self._store.get(f"rank-{rank}").decode().split() for rank in range(self._size))
        return [(int(look), int(progress)) for look, progress in pairs]
