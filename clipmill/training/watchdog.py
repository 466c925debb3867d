"""Ends a training that hangs, and names the rank that causes it.

If a peer never joins a collective, the collective waits for minutes and then names no rank. A rank that is stuck in its
own code, or stopped, reports nothing at all. Here, a thread of each rank reports the rank's progress to the others
through a separate store.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.distributed as dist

from clipmill.training.world import World

__all__ = ["Watchdog"]

LOOKS = 10
"""Number of times that a rank looks at the others' progress in ``hang_seconds``."""
ANSWER_SECONDS = 10.0
PATIENT_SECONDS = 3600.0
"""How long the ranks may wait during a save for a rank that still responds. Longer than rank 0 waits for a node's
upload; shorter than the timeout of a collective."""

logger = logging.getLogger(__name__)


class _Standings(NamedTuple):
    """Ranks that do not answer, and ranks whose progress is less than the furthest one's."""

    silent: list[int]
    behind: list[int]

    def __str__(self) -> str:
        if self.silent:
            return f"rank {', '.join(map(str, self.silent))} does not answer"
        if self.behind:
            return f"rank {', '.join(map(str, self.behind))} is behind the others"
        return "every rank waits at the same place"


class _Question:
    """Asks for the standings in a thread: see `Watchdog._watch`."""

    def __init__(self, ask: Callable[[], _Standings], patience_seconds: float) -> None:
        self._answers: list[_Standings] = []
        self._deadline = time.monotonic() + patience_seconds
        threading.Thread(target=lambda: self._answers.append(ask()), daemon=True).start()

    def answer(self) -> _Standings | None:
        """The standings; None while they may still arrive."""
        if self._answers:
            return self._answers[0]
        return _Standings(silent=[0], behind=[]) if time.monotonic() > self._deadline else None


class Watchdog:
    """Watches one rank of several. Creating one is collective.

    Args:
        world: this rank and its peers.
        hang_seconds: after this time without progress, the process ends itself with status 1. torchrun and Ray Train
            then tear the group down, and Ray Train restarts it from its last checkpoint.
    """

    def __init__(self, world: World, hang_seconds: float) -> None:
        self._rank, self._size, self._hang_seconds = world.rank, world.size, hang_seconds
        self._patience = ANSWER_SECONDS + 3 * hang_seconds / LOOKS
        self._limit_seconds = hang_seconds
        self._progress = 0
        self._ended = threading.Event()
        if world.size == 1:  # nobody to wait for
            return
        patience = datetime.timedelta(seconds=ANSWER_SECONDS)
        host = os.environ["MASTER_ADDR"]
        own = dist.TCPStore(host, 0, is_master=True, timeout=patience) if world.rank == 0 else None
        port = world.from_rank_zero(lambda: own.port if own is not None else None)
        self._store = own or dist.TCPStore(host, port, is_master=False, timeout=patience)
        self._tell(0)
        world.barrier()  # now every rank has reported at least once
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def advance(self) -> None:
        """Call it after each step, and after every other part of the work that all ranks do together."""
        self._progress += 1

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Raises the limit to `PATIENT_SECONDS` during the block: for loading, saving and exporting.

        A rank that does not respond at all is still named after ``hang_seconds``.
        """
        self._limit_seconds = max(self._hang_seconds, PATIENT_SECONDS)
        try:
            yield
        finally:
            self.advance()
            self._limit_seconds = self._hang_seconds

    def close(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def _watch(self) -> None:
        seen, since, look = self._progress, time.monotonic(), 0
        question: _Question | None = None
        while not self._ended.wait(self._hang_seconds / LOOKS):
            look += 1
            # In a thread: while the process with the store is stopped, even a call with a timeout does not return.
            threading.Thread(target=self._tell, args=(look,), daemon=True).start()
            if self._progress != seen:
                seen, since, question = self._progress, time.monotonic(), None
            idle_seconds = time.monotonic() - since
            if idle_seconds <= self._hang_seconds:
                continue
            question = question or _Question(self._standings, self._patience)
            standings = question.answer()
            if standings is None:
                continue
            question = None
            if (standings.silent or idle_seconds > self._limit_seconds) and self._progress == seen:
                logger.error("no progress for %g s on rank %d: %s; ending it", idle_seconds, self._rank, standings)
                os._exit(1)

    def _tell(self, look: int) -> None:
        self._store.set(f"rank-{self._rank}", f"{look} {self._progress}")

    def _standings(self) -> _Standings:
        before = self._told()
        time.sleep(3 * self._hang_seconds / LOOKS)
        now = self._told()
        silent = [rank for rank, (look, _) in enumerate(now) if rank != self._rank and look == before[rank][0]]
        furthest = max(progress for _, progress in now)
        return _Standings(silent, [rank for rank, (_, progress) in enumerate(now) if progress < furthest])

    def _told(self) -> list[tuple[int, int]]:
        """(number of the look, progress) of each rank."""
        pairs = (self._store.get(f"rank-{rank}").decode().split() for rank in range(self._size))
        return [(int(look), int(progress)) for look, progress in pairs]
