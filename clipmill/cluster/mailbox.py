"""The mailbox in which the driver of a training and its ranks meet: an actor on the driver's node.

Ranks put their newest progress there, because Ray Train's own ``report`` is a barrier without a timeout. The driver
puts requests to stop there. A rank that ends with a `ClipmillError` puts the error there, as its verdict. Each group of
ranks has its own mailbox.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from clipmill.errors import Interrupted

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["Mailbox", "News", "Report", "start_mailbox"]


class News(NamedTuple):
    """What a mailbox tells the driver."""

    progress: list[dict[str, Any]]
    """Newest progress of each rank that sent some since the last time, in the order of ranks."""
    has_begun: bool
    """Whether a rank has begun."""
    holds: bool
    """Whether a rank holds stops (`Report.hold_stops`)."""
    verdict: tuple[str, str] | None
    """Class name and message of the first `ClipmillError` that ended a rank."""


class Mailbox:
    """Actor on the driver's node: progress and verdicts of one group of ranks, and the driver's request to stop it."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._progress: dict[int, dict[str, Any]] = {}
        self._newest: dict[int, tuple[int, int]] = {}
        self._log: list[tuple[int, str]] = []
        self._attempts = 0
        self._holding: set[int] = set()
        self._finished: set[int] = set()
        self._verdict: tuple[str, str] | None = None
        self._controller: ActorHandle | None = None
        self._stop = asyncio.Event()
        self._all_finished = asyncio.Event()

    async def begin(self, rank: int) -> int | None:
        """Registers a rank.

        Returns:
            The attempt's number; None if there is a verdict already, or if the driver wants to stop.
        """
        self._attempts += 1
        self._finished.discard(rank)
        self._all_finished.clear()
        if self._stop.is_set():
            self._verdict = self._verdict or ("Interrupted", "stopped; submit the same command to go on")
        return self._attempts if self._verdict is None else None

    async def hold(self, rank: int) -> bool:
        """From now on a rank has work to save. False if the driver wants to stop, and the rank must end.

        Once one rank holds stops, the others may too, even after a stop: the ranks agree on the last step together.
        """
        if self._stop.is_set() and not self._holding:
            return False
        self._holding.add(rank)
        return True

    async def release(self, rank: int) -> None:
        """Ends what `hold` began."""
        self._holding.discard(rank)

    async def put(self, rank: int, number: tuple[int, int], progress: dict[str, Any]) -> None:
        """Keeps the newest progress of a rank. The order is by (attempt, update): async calls may run out of order."""
        if number > self._newest.get(rank, (0, 0)):
            self._newest[rank] = number
            self._progress[rank] = progress

    async def log(self, level: int, text: str) -> None:
        """Keeps a log message of a rank for the driver's log."""
        self._log.append((level, text))

    async def finish(self, rank: int, verdict: tuple[str, str] | None) -> None:
        """A rank ends. Only the first verdict (class name and message of a ClipmillError) counts."""
        self._verdict = self._verdict or verdict
        self._finished.add(rank)
        if len(self._finished) == self._num_ranks:
            self._all_finished.set()

    async def take(self) -> News:
        """What the driver has not seen yet."""
        progress = [{"log": self._log}] if self._log else []
        progress += [self._progress[rank] for rank in sorted(self._progress)]
        self._log = []
        self._progress.clear()
        return News(progress, self._attempts > 0, bool(self._holding), self._verdict)

    async def register_controller(self, controller: ActorHandle) -> None:
        """Ray Train's controller of the ranks has started."""
        self._controller = controller

    async def controller(self) -> ActorHandle | None:
        """Ray Train's controller, if it has begun."""
        return self._controller

    async def request_stop(self) -> None:
        """The driver wants the ranks to checkpoint and end."""
        self._stop.set()

    async def stopped(self) -> None:
        """Returns when the driver wants to stop: a rank keeps this call open instead of polling."""
        await self._stop.wait()

    async def all_finished(self) -> None:
        """Returns when every rank has ended."""
        await self._all_finished.wait()


class Report:
    """A training rank's connection to the driver; neither direction ever blocks a training step."""

    def __init__(self, mailbox: ActorHandle, rank: int, attempt: int) -> None:
        self._mailbox = mailbox
        self._rank, self._attempt, self._updates = rank, attempt, 0
        self._sent: Any = None
        self._stopped = mailbox.stopped.remote()

    def update(self, progress: dict[str, Any]) -> None:
        """Shows the driver this rank's newest progress: a small dict of plain values."""
        self._updates += 1
        self._sent = self._mailbox.put.remote(self._rank, (self._attempt, self._updates), progress)

    def log(self, level: int, text: str) -> None:
        """Shows the driver a message of this rank's log."""
        self._sent = self._mailbox.log.remote(level, text)

    def flush(self) -> None:
        """Waits until everything sent so far has arrived."""
        import ray

        if self._sent is not None:
            ray.get(self._sent)

    @contextlib.contextmanager
    def hold_stops(self) -> Iterator[None]:
        """Inside the block, a stop waits for this rank; outside, the driver ends the group at once.

        Raises:
            Interrupted: on entry, if the driver already wants to stop.
        """
        import ray

        if not ray.get(self._mailbox.hold.remote(self._rank)):
            raise Interrupted("stopped; submit the same command to go on")
        yield
        ray.get(self._mailbox.release.remote(self._rank))

    @property
    def stop_requested(self) -> bool:
        """Whether the driver wants to stop, or is gone: then save a checkpoint and raise Interrupted."""
        import ray

        ready, _ = ray.wait([self._stopped], timeout=0)
        return bool(ready)


def start_mailbox(num_ranks: int) -> ActorHandle:
    """Starts the mailbox of a group on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node: it must not die with another node, and without the driver it is useless.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote(num_ranks)
