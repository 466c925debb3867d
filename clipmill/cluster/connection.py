"""Shared by fan-out and training: the connection to Ray, capacity of its nodes, signals, and errors from workers."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from clipmill import storage
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, Interrupted, StageFailed, StorageUnavailable, UserError
from clipmill.grace import seconds_until_kill

__all__ = [
    "POLL_SECONDS",
    "WAIT_WARNING_SECONDS",
    "WORKER_ENVIRONMENT",
    "LivingNodes",
    "cluster_error",
    "connect",
    "death",
    "drain_seconds",
    "error_facts",
    "is_death",
    "is_embedded",
    "last_line",
    "living_nodes",
    "num_bundles",
    "require_capacity",
    "spared_nodes",
    "stop_signals",
    "waiting_message",
    "worker_environment",
]

WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""OpenMP threads must not spin while they wait: that made a step 4 times slower when another process used a core."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Only small dicts are sent, so the object store is small: decoders and models need Ray's default of 30 % of memory."""
START_ATTEMPTS = 3
CONNECT_TIMEOUT_SECONDS = 15
POLL_SECONDS = 0.5
WAIT_WARNING_SECONDS = 60
"""Seconds between two warnings while a stage waits for resources."""
START_SPARE_SECONDS = 600
"""Ray Train may take this much longer than ``cluster.wait_seconds`` to start workers, so our own limit ends first."""
NODES_SECONDS = 2.0
GIVE_UP_SECONDS = 10.0
"""Time for units that are given up to remove their temporary files."""

logger = logging.getLogger(__name__)


def worker_environment() -> dict[str, str]:
    """Environment variables of every worker process, on any node; none is a secret."""
    return WORKER_ENVIRONMENT | storage.places_environment()


def is_embedded(config: ClusterConfig) -> bool:
    """Whether ``connect`` would start an embedded Ray, whose workers share this machine's files."""
    return _address(config) is None


def _address(config: ClusterConfig) -> str | None:
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if not address or address == "local" else address


@contextlib.contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Holds a connection to Ray open; inside another connection it reuses that one.

    An embedded Ray ends with the block. It also ends if this process dies, in whatever way.

    Raises:
        UserError: Ray is not installed, or no cluster answers at the address.
        StageFailed: an embedded Ray did not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.wait_seconds + START_SPARE_SECONDS))
    # Hide Ray's token notice; users need not act on it.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        import ray
    except ImportError as error:
        raise UserError("this stage runs on Ray, which is not installed: pip install 'clipmill[cluster]'") from error
    if ray.is_initialized():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    address = _address(config)
    try:
        if address is None:
            _start_embedded(config)
        else:
            _join(address)
    except SystemExit as error:  # of the handler that ray.init sets for itself
        raise Interrupted("stopped; run the same command to go on") from error
    if callable(previous) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, previous)  # ray.init replaces the caller's handler by its own
    try:
        yield
    finally:
        ray.shutdown()


def _start_embedded(config: ClusterConfig) -> None:
    """Starts a Ray on this machine that ends with this process.

    Raises:
        StageFailed: it did not start. Ray allows a node 30 s, which may not be enough under heavy load.
    """
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",  # otherwise Ray joins any cluster that somebody else started on this machine
                num_cpus=config.num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise StageFailed(
                    f"Ray did not start on this machine in {attempt} attempts: {last_line(error)} Run again when the "
                    "machine is less busy"
                ) from error
            logger.warning("Ray did not start: %s Trying again", last_line(error))


def _join(address: str) -> None:
    """Connects to a running cluster, or says why it cannot: Ray itself retries a wrong address for minutes."""
    import ray

    if "://" in address:
        raise UserError(
            f"cluster address {address} is not a Ray head (HOST:6379): unset RAY_ADDRESS or cluster.address to run "
            "here, or submit the stage with `ray job submit`"
        )
    if address != "auto":
        _require_reachable(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise UserError(f"cannot join the Ray cluster at {address}: {last_line(error)}") from error


def _require_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"cluster address {address} must be HOST:PORT (the head's port, usually 6379)")
    advice = "check cluster.address or RAY_ADDRESS, and that `ray start --head` runs there"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}): {advice}") from error
    if os.environ.get("RAY_USE_TLS", "0") in ("0", "false"):
        # Another program may listen there, and Ray would wait for its answer for ever.
        import grpc  # type: ignore[import-untyped]

        channel = grpc.insecure_channel(address)
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise UserError(f"what answers at {address} is not a Ray head: {advice}") from error
        finally:
            channel.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second SIGINT raises KeyboardInterrupt.

    Only the main thread receives signals; in other threads the event stays unset.
    """
    stop = threading.Event()

    def handle(signum: int, frame: object) -> None:
        if signum == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def drain_seconds(config: ClusterConfig) -> tuple[float, float]:
    """After a stop: seconds for running units to finish, and seconds for those given up to clean up.

    A Ray job is killed RAY_JOB_STOP_WAIT_TIME_S after its SIGTERM, so both shrink to fit.
    """
    left = seconds_until_kill()
    if left is None:
        return config.drain_seconds, GIVE_UP_SECONDS
    give_up = min(GIVE_UP_SECONDS, left / 2)
    return max(0.0, min(config.drain_seconds, left - 2 * give_up)), give_up


class Node(NamedTuple):
    """A living node of the cluster."""

    id: str
    host: str
    resources: dict[str, float]
    """Such as ``{"CPU": 8.0, "GPU": 1.0}``."""

    @property
    def is_head(self) -> bool:
        """Whether Ray's own head runs there."""
        return "node:__internal_head__" in self.resources


def living_nodes() -> list[Node]:
    """The nodes that are alive now."""
    import ray

    return [
        Node(node["NodeID"], node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]


class LivingNodes:
    """The living nodes, at most NODES_SECONDS old: the query loads the head of a large cluster."""

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._nodes: list[Node] = []
        self._hosts: dict[str, str] = {}

    def all(self) -> list[Node]:
        """The living nodes."""
        if time.monotonic() - self._asked >= NODES_SECONDS:
            self._nodes, self._asked = living_nodes(), time.monotonic()
            self._hosts |= {node.id: node.host for node in self._nodes}
        return self._nodes

    def ids(self) -> set[str]:
        """Their ids."""
        return {node.id for node in self.all()}

    def host(self, node: str) -> str:
        """Host name of a node that lives or lived."""
        if node not in self._hosts:
            self._asked = float("-inf")  # the node joined after the last query
            self.all()
        return self._hosts.get(node, "an unknown host")


def spared_nodes(config: ClusterConfig, nodes: LivingNodes) -> frozenset[str]:
    """Ids of the nodes that ``cluster.spare_head`` keeps free of decoders."""
    if not config.spare_head:
        return frozenset()
    if is_embedded(config):
        logger.warning("cluster.spare_head has no effect: an embedded Ray has no node but its head")
        return frozenset()
    heads = frozenset(node.id for node in nodes.all() if node.is_head)
    if len(heads) == len(nodes.all()):
        logger.warning("cluster.spare_head: the head is the only node of the cluster; waiting for another one")
    return heads


def num_bundles(bundle: dict[str, float], nodes: Iterable[Node], excluded: Collection[str] = ()) -> int:
    """How many workers of ``bundle`` fit on these nodes at once if nothing else runs there."""
    asked = {name: amount for name, amount in bundle.items() if amount > 0}
    return sum(
        int(min(node.resources.get(name, 0) // amount for name, amount in asked.items()))
        for node in nodes
        if node.id not in excluded
    )


def require_capacity(
    config: ClusterConfig,
    bundle: dict[str, float],
    count: int,
    waited_seconds: float,
    excluded: Collection[str] = (),
) -> None:
    """Raises when ``count`` workers of ``bundle`` can never be placed.

    An embedded Ray never grows, so it is refused at once. A cluster has ``cluster.wait_seconds`` to add nodes.

    Raises:
        UserError: names the request and the resources of the embedded Ray.
        Interrupted: the same for a cluster, which may have more nodes later.
    """
    if waited_seconds < config.wait_seconds and not is_embedded(config):
        return
    nodes = living_nodes()
    if num_bundles(bundle, nodes, excluded) >= count:
        return
    barred = [f"{node.host} ({node.id})" for node in nodes if node.id in excluded]
    raise (UserError if is_embedded(config) else Interrupted)(
        f"{count} worker(s) of {_amounts(bundle)} do not fit {_cluster_summary()}"
        + (f", of which sick or spared by cluster.spare_head: {', '.join(barred)}" if barred else "")
        + ": lower cluster.fanout_cpus, tokenize.decode_cpus, cluster.training_workers, cluster.training_cpus or "
        "cluster.use_gpu, or add nodes and run the same command again"
    )


def waiting_message(bundle: dict[str, float], count: int, waited_seconds: float) -> str:
    """One line for the log while ``count`` workers have not been placed."""
    import ray

    free = _amounts({name: ray.available_resources().get(name, 0.0) for name in bundle})
    return (
        f"{count} worker(s) of {_amounts(bundle)} have not started after {waited_seconds:.0f} s; "
        f"free are {free} of {_cluster_summary()}"
    )


def _amounts(bundle: dict[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items() if amount or name == "CPU")


def _cluster_summary() -> str:
    nodes = living_nodes()
    largest = {name: max((node.resources.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
    return f"the cluster ({len(nodes)} node(s), the largest {largest['CPU']:g} CPU + {largest['GPU']:g} GPU)"


def last_line(error: BaseException | str) -> str:
    """The last line of an error that says something; for a traceback that is the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


_KINDS = (UserError, Interrupted, StorageUnavailable, StageFailed)
"""The error that the driver raises for a worker's ClipmillError, whose exact class it may not know."""


def error_facts(error: ClipmillError) -> tuple[str, str]:
    """A ClipmillError as a worker sends it to the driver: the name of its kind, and its message."""
    return next((kind.__name__ for kind in _KINDS if isinstance(error, kind)), StageFailed.__name__), str(error)


def cluster_error(kind: str, message: str) -> ClipmillError:
    """The ClipmillError that a worker sent to the driver."""
    return {one.__name__: one for one in _KINDS}.get(kind, StageFailed)(message)


def is_death(error: BaseException) -> bool:
    """Whether Ray reports the end of a worker process or its node, not an exception inside it."""
    import ray

    return isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayActorError)


def death(error: BaseException) -> str:
    """One line about a dead worker: the sentence of Ray's long report that says how it ended."""
    detail = re.search(r"Worker exit detail: (.*?)\.(\s|$)", str(error))
    return f"the worker process died: {detail[1] if detail else last_line(error)}"
