"""Runs the ranks of one training on Ray, as one group of ranks after another.

If a group fails, the next one resumes from the newest checkpoint. The count of failures restarts after each checkpoint:
three spot terminations in two weeks are not three in a row. With ``training_workers: {min, max}``, the next group has
as many ranks as fit on the nodes. When nodes return, a group ends after a checkpoint to make place for a larger one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from clipmill.cluster.connection import (
    POLL_SECONDS,
    WAIT_WARNING_SECONDS,
    cluster_error,
    connect,
    is_embedded,
    living_nodes,
    num_bundles,
    require_capacity,
    stop_signals,
    waiting_message,
)
from clipmill.cluster.group import PEER_GRACE_SECONDS, Group, reason
from clipmill.cluster.growth import Growth
from clipmill.cluster.mailbox import Report
from clipmill.cluster.metrics import exporting
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, Interrupted, StageFailed, UserError
from clipmill.scratch import ScratchFolder

__all__ = ["Report", "connect", "is_embedded", "run_workers"]

STOPPED = "stopped; submit the same command to go on"

logger = logging.getLogger(__name__)


def run_workers(
    train: Callable[[Any, Report], None],
    payload: Any,
    *,
    config: ClusterConfig,
    name: str,
    on_progress: Callable[[dict[str, Any]], None],
    is_usable: Callable[[int], bool] = lambda num_workers: True,
    count_progress: Callable[[], int] = lambda: 0,
) -> None:
    """Runs ``train(payload, report)`` on each rank of one process group after another, until a group succeeds.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set and torch.distributed is initialised (gloo, or
    nccl with GPUs). A rank that crashes or is killed ends its group; in the next group, ``train`` resumes from its own
    checkpoints. SIGTERM or SIGINT in this process sets ``report.stop_requested``.

    Args:
        train: picklable; ends early by raising a ClipmillError, which is raised here unchanged and not retried.
        payload: picklable; absolute URLs only, because workers start in another folder.
        config: where, and on how many workers.
        name: of the run, for Ray's own logs.
        on_progress: called in this process with the newest dict of each rank that sent one since the last call (about
            2 Hz).
        is_usable: whether the training can run on this number of workers.
        count_progress: returns a number that grows with each checkpoint.

    Raises:
        Interrupted: the ranks stopped after a clean checkpoint.
        UserError: raised by a rank, or the workers cannot be placed.
        StageFailed: raised by a rank, or groups failed more than ``config.max_failures`` times since a checkpoint.
    """
    sizes = _sizes(config, is_usable)
    failures = _Failures(config.max_failures, name, count_progress)
    with connect(config), exporting(), stop_signals() as stop:
        bundle = _training_bundle(config)
        storage = ScratchFolder("train")
        try:
            while True:
                num_workers = _size_now(sizes, bundle)
                require_capacity(config, bundle, num_workers, waited_seconds=0)
                group = Group(train, payload, config, bundle, num_workers, name, str(storage.path))
                with Growth(bundle, num_workers, sizes) as growth:
                    watch = _Watch(group, config, bundle, sizes, growth, stop, on_progress)
                    ended = watch.until_end()
                if ended:
                    if group.error is None:
                        return
                    failures.add(group.error)
        finally:
            storage.close()


def _sizes(config: ClusterConfig, is_usable: Callable[[int], bool]) -> list[int]:
    """Numbers of workers that this training may have, ascending."""
    if config.fewest_workers == config.most_workers:
        return [config.most_workers]  # the ranks themselves say what is wrong with it
    sizes = [size for size in range(config.fewest_workers, config.most_workers + 1) if is_usable(size)]
    if not sizes:
        raise UserError(
            f"cluster.training_workers {config.fewest_workers} to {config.most_workers}: this training can run on none "
            "of these numbers of workers; its global_batch must hold a clip for each of them, and split evenly if the "
            "model has batch statistics"
        )
    return sizes


def _size_now(sizes: list[int], bundle: dict[str, float]) -> int:
    """The largest size that the living nodes hold. If they hold none, the smallest, which then waits for nodes."""
    room = num_bundles(bundle, living_nodes())
    return max((size for size in sizes if size <= room), default=sizes[0])


def _training_bundle(config: ClusterConfig) -> dict[str, float]:
    """The resources that one training worker requests. The default number of CPUs is an even share of a node's."""
    num_gpus = 1.0 if config.use_gpu else 0.0
    if config.training_cpus is not None:
        return {"CPU": float(config.training_cpus), "GPU": num_gpus}
    nodes = living_nodes()
    most = int(max((node.resources.get("CPU", 0) for node in nodes), default=1))
    for num_cpus in range(most, 1, -1):
        if num_bundles({"CPU": num_cpus, "GPU": num_gpus}, nodes) >= config.most_workers:
            return {"CPU": float(num_cpus), "GPU": num_gpus}
    return {"CPU": 1.0, "GPU": num_gpus}


class _Failures:
    """Failed groups since the last checkpoint.

    Args:
        most: maximum number of failures.
        name: of the run.
        count_progress: see `run_workers`.
    """

    def __init__(self, most: int, name: str, count_progress: Callable[[], int]) -> None:
        self._most, self._name, self._count_progress = most, name, count_progress
        self._progress = 0
        self._num_in_a_row = 0

    def add(self, error: Exception) -> None:
        """Counts a failure.

        Raises:
            StageFailed: there were more than ``most``.
        """
        progress = self._progress
        try:
            progress = self._count_progress()
        except (OSError, ClipmillError) as problem:  # unreachable storage alone must not end the run
            logger.warning("%s: cannot look for a new checkpoint: %s", self._name, problem)
        if progress > self._progress:
            self._progress, self._num_in_a_row = progress, 0
        self._num_in_a_row += 1
        if self._num_in_a_row > self._most:
            raise StageFailed(f"{self._name}: training workers failed: {reason(error)}") from error
        logger.warning(
            "%s: training workers failed, %d of at most %d times since the last checkpoint: %s; starting them again",
            self._name,
            self._num_in_a_row,
            self._most,
            reason(error),
        )


class _Watch:
    """Relays progress and signals of a group until it ends."""

    def __init__(
        self,
        group: Group,
        config: ClusterConfig,
        bundle: dict[str, float],
        sizes: list[int],
        growth: Growth,
        stop: threading.Event,
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        self._group, self._config, self._bundle, self._sizes = group, config, bundle, sizes
        self._growth, self._stop, self._on_progress = growth, stop, on_progress
        self._no_room_since: float | None = time.monotonic()
        self._next_look = time.monotonic() + WAIT_WARNING_SECONDS
        self._is_stopping = self._is_growing = False

    def until_end(self) -> bool:
        """Waits for the end of the group. False if it ended so that another number of workers can continue.

        Raises:
            ClipmillError: the verdict of the ranks, or `Interrupted` if a stop came when there was nothing to save.
        """
        grace_seconds = PEER_GRACE_SECONDS
        try:
            while not self._group.wait(POLL_SECONDS):
                news = self._group.news()
                for update in news.progress:
                    self._on_progress(update)
                if news.verdict is not None:
                    continue  # the ranks are ending
                if self._stop.is_set() and not self._is_stopping:
                    logger.warning("stopping: the training workers finish a checkpoint first")
                    self._group.request_stop()
                    self._is_stopping = True
                elif self._is_stopping and not news.holds:
                    grace_seconds = 0.0
                    raise Interrupted(STOPPED)
                elif self._is_stopping and self._room() < self._group.num_workers:  # no ranks could save a checkpoint
                    raise Interrupted("stopped while a node was missing; submit the same command again")
                elif not news.has_begun and self._must_shrink():
                    grace_seconds = 0.0
                    return False
                elif news.holds and not self._is_growing and self._growth.is_ready():
                    self._group.request_stop()
                    self._is_growing = True
                self._warn_if_no_room(news.has_begun)
            return self._judge()
        finally:
            self._group.abandon(grace_seconds)

    def _judge(self) -> bool:
        news = self._group.news()
        for update in news.progress:
            self._on_progress(update)
        if news.verdict is None:
            return True
        error = cluster_error(*news.verdict)
        if self._is_growing and not self._stop.is_set() and isinstance(error, Interrupted):
            logger.warning("training: there is room for more than %d workers; starting them", self._group.num_workers)
            return False
        raise error

    def _room(self) -> int:
        return num_bundles(self._bundle, living_nodes())

    def _must_shrink(self) -> bool:
        """Whether this group waits for a lost node although a smaller group would fit."""
        return self._room() < self._group.num_workers and _size_now(self._sizes, self._bundle) < self._group.num_workers

    def _warn_if_no_room(self, has_begun: bool) -> None:
        """Warns if the group is not yet placed or lost a node: Ray Train waits for ever, without a message."""
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + WAIT_WARNING_SECONDS
        num_workers = self._group.num_workers
        if has_begun and self._room() >= num_workers:
            self._no_room_since = None
            return
        self._no_room_since = self._no_room_since or now
        waited_seconds = now - self._no_room_since
        require_capacity(self._config, self._bundle, num_workers, waited_seconds)
        logger.warning("training: %s", waiting_message(self._bundle, num_workers, waited_seconds))
