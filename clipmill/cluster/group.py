"""One group of training ranks on Ray, from its start to its end.

The workers and the driver meet in a mailbox (see `clipmill.cluster.mailbox`). A rank that ends with a
``ClipmillError`` leaves its verdict there and returns normally: Ray Train would wrap the exception.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clipmill.cluster.connection import death, error_facts, is_death, last_line, worker_environment
from clipmill.cluster.mailbox import News, Report, start_mailbox
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, Interrupted

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["PEER_GRACE_SECONDS", "Group", "reason"]

COLLECTIVE_TIMEOUT_SECONDS = 7200
"""Longer than the watchdog waits, because only the watchdog can name the rank that hangs."""
PEER_GRACE_SECONDS = 30.0
"""How long a rank that gave up waits for the others to end too, before it has the group torn down."""
CONTROLLER_SECONDS = 30
"""How long an abandoned group may take to start or to end Ray Train's controller."""

logger = logging.getLogger(__name__)


def _run_rank(task: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import ray
    import ray.train
    import torch

    mailbox, rank = task["mailbox"], ray.train.get_context().get_world_rank()
    torch.set_num_threads(task["num_threads"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    attempt = ray.get(mailbox.begin.remote(rank))
    if attempt is None:
        return
    report = Report(mailbox, rank, attempt)
    try:
        task["train"](task["payload"], report)
    except ClipmillError as error:
        ray.get(mailbox.finish.remote(rank, error_facts(error)))
        if not isinstance(error, Interrupted):
            _await_peers(mailbox)
    else:
        report.flush()
        ray.get(mailbox.finish.remote(rank, None))


def _await_peers(mailbox: ActorHandle) -> None:
    """Gives the other ranks time to end too. A rank that waits for this one in a collective never ends.

    This rank then crashes, because only a crash makes Ray Train tear the group down. The driver finds the verdict in
    the mailbox.
    """
    import ray

    ended, _ = ray.wait([mailbox.all_finished.remote()], timeout=PEER_GRACE_SECONDS)
    if not ended:
        raise RuntimeError("this rank gave up and the others still wait for it")


def _trainer(base: type, mailbox: ActorHandle) -> type:
    """A trainer whose controller can be ended, and without Ray Train's detached cleaner of placement groups.

    The placement groups end with the driver anyway, and without a dashboard the cleaner prints an error every second.
    This uses private API. If it is renamed, the errors come back, and a training that is stopped while it waits for a
    node can end with Ray's exit status (tests detect both).
    """
    own: list[Any] = []
    with contextlib.suppress(ImportError):
        from ray.train.v2._internal.execution.callback import ControllerCallback

        class Introduction(ControllerCallback):
            def after_controller_start(self, train_run_context: Any) -> None:
                import ray

                mailbox.register_controller.remote(ray.get_runtime_context().current_actor)

        own.append(Introduction())

    class Trainer(base):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"] + own

    return Trainer


class Group:
    """A running group. Ray Train's ``fit`` blocks, so it runs in a thread, and the driver can still handle signals.

    Args:
        train: see `clipmill.cluster.launch.run_workers`, as ``payload``.
        payload: for ``train``.
        config: where to run.
        bundle: resources of one worker.
        num_workers: ranks of the group.
        name: of the run, for Ray's own logs.
        storage: local folder for Ray Train.

    Attributes:
        num_workers: ranks of the group.
        error: why it failed; None until then.
    """

    def __init__(
        self,
        train: Callable[[Any, Report], None],
        payload: Any,
        config: ClusterConfig,
        bundle: dict[str, float],
        num_workers: int,
        name: str,
        storage: str,
    ) -> None:
        self.num_workers = num_workers
        self.error: Exception | None = None
        self._mailbox = start_mailbox(num_workers)
        num_threads = max(1, int(bundle["CPU"]))
        task = {"mailbox": self._mailbox, "train": train, "payload": payload, "num_threads": num_threads}
        self._trainer = self._make_trainer(task, config, bundle, name, storage)
        self._thread = threading.Thread(target=self._run, name="ray-train-fit", daemon=True)
        self._thread.start()

    def _make_trainer(
        self, task: dict[str, Any], config: ClusterConfig, bundle: dict[str, float], name: str, storage: str
    ) -> Any:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
        # It warns train functions of nodes that will go away; ours do not ask, and restart from their checkpoints.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        import ray.train
        import ray.train.torch

        environment = {**worker_environment(), "OMP_NUM_THREADS": str(task["num_threads"])}
        if not config.use_gpu:
            # Workers that request no GPU still see all GPUs.
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return _trainer(ray.train.torch.TorchTrainer, self._mailbox)(
            # Not passed as train_loop_config: Ray Train's controller would unpickle that too, and import the stage.
            functools.partial(_run_rank, task),
            torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.num_workers,
                use_gpu=config.use_gpu,
                resources_per_worker={name: amount for name, amount in bundle.items() if amount},
            ),
            run_config=ray.train.RunConfig(
                # Every name is used once: Ray Train silently resumes a run whose name it knows.
                name=f"{name}-{uuid.uuid4().hex[:8]}",
                storage_path=storage,
                # Ray Train would count failures over the whole training; ours are counted since the last checkpoint.
                failure_config=ray.train.FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": environment},
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error

    def wait(self, timeout_seconds: float) -> bool:
        """Whether the group has ended, after waiting at most this long for it."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def news(self) -> News:
        """What its ranks have reported since the last call."""
        import ray

        return ray.get(self._mailbox.take.remote())

    def request_stop(self) -> None:
        """Asks the ranks to save a checkpoint and end. Once this has returned, no rank begins to hold stops."""
        import ray

        ray.get(self._mailbox.request_stop.remote())

    def abandon(self, grace_seconds: float) -> None:
        """Ends a group that still runs, after giving its ranks some time to end by themselves.

        The thread must end too: a call to Ray after the connection is closed would end this process at once, with
        Ray's exit status.

        Args:
            grace_seconds: time for the ranks; 0 if they have nothing to save.
        """
        import ray

        if self._thread.is_alive():
            self._mailbox.request_stop.remote()  # if the mailbox is gone, the ranks stop anyway
            self._thread.join(grace_seconds)
        deadline = time.monotonic() + CONTROLLER_SECONDS
        with contextlib.suppress(ray.exceptions.RayError):  # perhaps it was the mailbox that failed
            while self._thread.is_alive() and time.monotonic() < deadline:
                controller = ray.get(self._mailbox.controller.remote(), timeout=CONTROLLER_SECONDS)
                if controller is not None:
                    ray.kill(controller)
                self._thread.join(0.5)
        ray.kill(self._mailbox)


def reason(error: Exception) -> str:
    """The line of a Ray Train failure that names the cause: an exception of a rank rather than a dead process."""
    failures = sorted(getattr(error, "worker_failures", {}).items(), key=lambda item: (is_death(item[1]), item[0]))
    if not failures:
        return last_line(error)
    rank, failure = failures[0]
    return f"rank {rank}: {death(failure) if is_death(failure) else f'{type(failure).__name__}: {last_line(failure)}'}"
