"""The actors of one fan-out, from request to end.

Actors are requested without naming a node, so that Ray places them; an autoscaler sees the pending ones as demand. Only
sick nodes, and with ``spare_head`` the head, are excluded. After a failed start on a node, the next worker there starts
after a growing pause; the stage ends only if no worker starts anywhere.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from clipmill.cluster import connection
from clipmill.cluster.actor import FanoutActor, Outcome, start_bell
from clipmill.cluster.nodes import NodeWatch
from clipmill.cluster.pauses import pause
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, StageFailed

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

__all__ = ["MIN_FREE_SHARE", "Worker", "Workers"]

MIN_FREE_SHARE = 0.1
"""Minimum free share of a node's memory. At 5 % Ray kills workers, whatever video they are decoding."""
MAX_WAITING = 64
"""Maximum number of workers that wait for room at once if ``fanout_workers`` is not set."""
NODE_LABEL = "ray.io/node-id"
"""Label that Ray sets on every node."""

logger = logging.getLogger(__name__)


class _Call(NamedTuple):
    ref: ObjectRef
    unit: int | None
    """Index of a unit; None for ``place``, ``start`` and ``watch``."""


@dataclass(eq=False)
class Worker:
    """An actor and its pending calls, in the order in which it answers them."""

    actor: ActorHandle
    calls: deque[_Call]
    created: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.monotonic)
    """When it began the oldest pending call."""
    node: str = ""
    """Ray's id of the node where it was placed; "" before that."""
    is_started: bool = False
    is_spent: bool = False
    """It gets no more units and ends after its pending calls, because a failed unit may have damaged its process."""
    free_share: float = 1.0
    """Free share of its node's memory, as last reported."""

    @property
    def is_short(self) -> bool:
        """Whether its node has too little memory left for another unit."""
        return self.free_share < MIN_FREE_SHARE

    @property
    def units(self) -> list[int]:
        """Its units; it works on the first."""
        return [call.unit for call in self.calls if call.unit is not None]


class Workers:
    """The actors of one fan-out.

    Args:
        make_worker: runs once in each actor.
        arguments: of make_worker.
        config: how many actors, and of what size.
        nodes: what is known about the nodes; starts are recorded there.
        beside_cpus: CPUs of an actor in addition to ``fanout_cpus``.

    Attributes:
        all: in the order in which they were requested.
        cluster: the living nodes.
    """

    def __init__(
        self,
        make_worker: Callable[..., Callable[[Any], dict[str, Any]]],
        arguments: tuple[Any, ...],
        config: ClusterConfig,
        nodes: NodeWatch,
        beside_cpus: int = 0,
    ) -> None:
        import ray

        self.all: list[Worker] = []
        self.cluster = connection.LivingNodes()
        self._config, self._nodes = config, nodes
        self._bundle = {"CPU": float(config.fanout_cpus + beside_cpus), "GPU": 1.0 if config.use_gpu else 0.0}
        self._spared = connection.spared_nodes(config, self.cluster)
        connection.require_capacity(config, self._bundle, 1, waited_seconds=0, excluded=self._excluded)
        self._bell = start_bell()
        # Put into the object store once instead of once per actor: arguments may contain a model's weights.
        self._worker = (ray.put(make_worker), ray.put(arguments))
        self._actor_class = ray.remote(
            num_cpus=self._bundle["CPU"], num_gpus=self._bundle["GPU"], max_restarts=0, max_task_retries=0
        )(FanoutActor)
        self._failed_places = 0
        self._next_place = 0.0
        self._verdict: ClipmillError | None = None
        """Error that ends the stage, unless a worker that is still starting succeeds."""
        self._next_warning = time.monotonic() + connection.WAIT_WARNING_SECONDS

    @property
    def _excluded(self) -> frozenset[str]:
        return self._spared | self._nodes.sick

    def nodes_at_work(self) -> set[str]:
        """Nodes that still get units and have a started worker."""
        return {worker.node for worker in self.all if worker.is_started} - self._nodes.sick

    def places(self) -> set[str]:
        """Nodes that work or may soon work: a worker that was requested recently may start on any node."""
        now = time.monotonic()
        young = [
            worker
            for worker in self.all
            if not worker.is_started and now - worker.created < connection.WAIT_WARNING_SECONDS
        ]
        soon = {worker.node for worker in young if worker.node}
        if any(not worker.node for worker in young):
            holds = {node.id for node in self.cluster.all() if connection.num_bundles(self._bundle, [node])}
            soon |= holds - self._excluded
        return self.nodes_at_work() | (soon - self._nodes.sick)

    def num_running(self, node: str) -> int:
        """Workers of a node that have a unit."""
        return sum(worker.node == node and bool(worker.units) for worker in self.all)

    def fill(self, num_units: int) -> None:
        """Requests as many workers as ``num_units`` units need, and starts those that were placed.

        Raises:
            StageFailed, UserError: no worker starts anywhere.
        """
        now = time.monotonic()
        for worker in [worker for worker in self.all if not worker.calls]:
            if worker.is_spent or worker.node in self._nodes.sick:
                self.drop(worker)
            elif not worker.is_started and self._nodes.may_start(worker.node, now):
                self._call(worker, worker.actor.start.remote(*self._worker))
        self._judge_starts()
        wanted = min(self._config.fanout_workers or self._default_number(), num_units)
        unplaced = [worker for worker in self.all if not worker.node]
        for worker in unplaced[: max(0, len(self.all) - wanted)]:
            self.drop(worker)  # otherwise an autoscaler would add a node for it
        while len(self.all) < wanted and now >= self._next_place and self._verdict is None:
            self._ask()

    def _default_number(self) -> int:
        """As many as the cluster holds, and some more, for which an autoscaler adds nodes.

        As many again wait as fit now, up to a limit. A cluster that can grow therefore doubles, and in one that cannot,
        few workers wait in vain.
        """
        num_places = connection.num_bundles(self._bundle, self.cluster.all(), self._excluded)
        num_waiting = 0 if connection.is_embedded(self._config) else min(num_places, MAX_WAITING)
        return max(1, num_places + num_waiting)

    def _ask(self) -> None:
        actor_class = self._actor_class
        if excluded := self._excluded & self.cluster.ids():
            actor_class = actor_class.options(label_selector={NODE_LABEL: f"!in({','.join(sorted(excluded))})"})
        actor = actor_class.remote(self._config.fanout_cpus, self._bell, connection.worker_environment())
        self.all.append(Worker(actor, deque([_Call(actor.place.remote(), None)])))

    def give(self, worker: Worker, index: int, unit: Any) -> None:
        """Hands a unit to a worker."""
        self._call(worker, worker.actor.run.remote(unit), index)

    def watch(self, worker: Worker) -> None:
        """Asks an idle worker to report, a little later, how much memory is free."""
        self._call(worker, worker.actor.watch.remote())

    def _call(self, worker: Worker, ref: ObjectRef, unit: int | None = None) -> None:
        if not worker.calls:
            worker.began = time.monotonic()
        worker.calls.append(_Call(ref, unit))

    def answers(self, timeout_seconds: float) -> Iterator[tuple[Worker, int, float, Outcome]]:
        """Waits for answers; yields those about units: (worker, unit, when the unit began, outcome).

        The outcome of a unit whose actor ended is ("lost", one line). All other answers are handled here.
        """
        import ray

        heads = {worker.calls[0].ref: worker for worker in self.all if worker.calls}
        ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0) if heads else ([], [])
        if not ready and heads:
            ready, _ = ray.wait(list(heads), num_returns=1, timeout=timeout_seconds)
        elif not heads:
            time.sleep(timeout_seconds)  # every worker pauses
        for ref in ready:
            worker = heads[ref]
            call, began = worker.calls.popleft(), worker.began
            worker.began = time.monotonic()
            answer = _read(ref)
            if call.unit is not None:
                outcome, worker.free_share = answer if isinstance(answer[0], tuple) else (answer, worker.free_share)
                worker.is_spent |= outcome[0] != "done"
                yield worker, call.unit, began, outcome
            elif not worker.node:
                self._take_place(worker, answer)
            elif not worker.is_started:
                self._take_start(worker, answer)
            elif isinstance(answer, float):
                worker.free_share = answer
            else:
                self.drop(worker)  # it died while it had no unit

    def _take_place(self, worker: Worker, answer: str | Outcome) -> None:
        if not isinstance(answer, str):
            self._lose_start(worker, answer)
        elif answer in self._excluded:  # the node was excluded after the request
            self.drop(worker)
        else:
            worker.node = answer
            self._failed_places = 0
            self._nodes.add(answer, self.cluster.host(answer))

    def _take_start(self, worker: Worker, outcome: Outcome) -> None:
        if outcome[0] != "done":
            self._lose_start(worker, outcome)
            return
        worker.is_started = True
        self._verdict = None
        self._nodes.started(worker.node)

    def _lose_start(self, worker: Worker, outcome: Outcome) -> None:
        kind, body = outcome
        self.drop(worker)
        error = connection.cluster_error(*body) if kind == "raised" else None
        cause = str(error) if error else connection.last_line(body)
        now, node = time.monotonic(), worker.node
        if node:
            self._nodes.start_failed(node, cause, now)
            num_failed = self._nodes.num_failed_starts(node)
        else:  # Ray does not say on which node
            self._failed_places += 1
            self._next_place = now + pause(self._failed_places)
            num_failed = self._failed_places
            logger.warning("a worker could not be placed: %s", cause)
        if any(other.is_started for other in self.all):
            if num_failed > self._config.max_failures and node and node not in self.nodes_at_work():
                self._nodes.cannot_start(node)
        elif error or num_failed > self._config.max_failures:
            self._verdict = error or StageFailed(f"no worker can start, at last: {cause}")

    def _judge_starts(self) -> None:
        """Raises the verdict if no other node may still start a worker."""
        if self._verdict is None:
            return
        now = time.monotonic()
        if any(worker.node for worker in self.all):
            return
        is_young = any(now - worker.created < connection.WAIT_WARNING_SECONDS for worker in self.all)
        if not is_young or len(self.cluster.ids() - self._excluded) == 1:
            raise self._verdict

    def drop(self, worker: Worker) -> None:
        """Ends an actor at once."""
        import ray

        self.all.remove(worker)
        ray.kill(worker.actor)

    def ring(self, times: int) -> None:
        """Tells all workers to begin no more units (1), or to give up their running units (2)."""
        self._bell.ring.remote(times)

    def end(self, give_up_seconds: float) -> None:
        """Ends all actors. Units that still run get ``give_up_seconds`` to remove their temporary files."""
        import ray

        try:
            last = [worker.calls[-1].ref for worker in self.all if worker.units]
            if last:
                self.ring(2)
                ray.wait(last, num_returns=len(last), timeout=give_up_seconds)
        finally:
            for worker in list(self.all):
                self.drop(worker)
            # The bell is not killed: actors that still wait for it would call it again, and Ray would print errors. It
            # ends with its last handle.

    def mention_unplaced(self) -> None:
        """Warns from time to time while workers wait for room.

        Raises:
            UserError: no node can ever hold one.
        """
        now = time.monotonic()
        unplaced = [worker for worker in self.all if not worker.node]
        if not unplaced or now < self._next_warning:
            return
        self._next_warning = now + connection.WAIT_WARNING_SECONDS
        waited_seconds = now - min(worker.created for worker in unplaced)
        if len(unplaced) < len(self.all) or waited_seconds < connection.WAIT_WARNING_SECONDS:
            return  # others work, and waiting workers are demand for an autoscaler
        connection.require_capacity(self._config, self._bundle, 1, waited_seconds, self._excluded)
        logger.warning("fan-out: %s", connection.waiting_message(self._bundle, len(unplaced), waited_seconds))


def _read(ref: ObjectRef) -> Any:
    """The answer to a call: ("lost", one line) if its actor ended, ("failed", text) if Ray could not make the call."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return ("lost", connection.death(error)) if connection.is_death(error) else ("failed", str(error))
