"""Runs the ranks of one training run on Ray.

The workers and the driver meet in a mailbox (see `clipmill.cluster.mailbox`). A rank that ends with a
``ClipmillError`` leaves its verdict there and returns normally. Ray Train retries every exception, but a user error or
a clean interruption must be neither retried nor wrapped.
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

from clipmill.cluster.connection import (
    POLL_SECONDS,
    WAIT_WARNING_SECONDS,
    WORKER_ENVIRONMENT,
    cluster_error,
    connect,
    death,
    is_death,
    is_embedded,
    last_line,
    living_nodes,
    num_bundles,
    require_capacity,
    stop_signals,
    waiting_message,
)
from clipmill.cluster.mailbox import Report, start_mailbox
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, Interrupted, StageFailed
from clipmill.scratch import ScratchFolder

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["Report", "connect", "is_embedded", "run_workers"]

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT_SECONDS = 7200
"""A rank that hangs is to be found by those who can name it, long before its peers lose their patience."""
PEER_GRACE_SECONDS = 30
"""How long a rank that gave up lets the others come to the same end before it has the group torn down."""
GROUP_START_TIMEOUT_SECONDS = 600
"""Ray Train's own 60 s start the wait anew on a busy machine while the workers still import torch."""


def _run_rank(task: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import ray
    import ray.train
    import torch

    mailbox, rank = task["mailbox"], ray.train.get_context().get_world_rank()
    torch.set_num_threads(task["num_threads"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    group = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"  # a port of its own each time
    attempt = ray.get(mailbox.begin.remote(rank, group))
    if attempt is None:
        return
    report = Report(mailbox, rank, attempt)
    try:
        task["train"](task["payload"], report)
    except ClipmillError as error:
        ray.get(mailbox.finish.remote(rank, (type(error).__name__, str(error))))
        if not isinstance(error, Interrupted):
            _await_peers(mailbox)
    else:
        report.flush()
        ray.get(mailbox.finish.remote(rank, None))


def _await_peers(mailbox: ActorHandle) -> None:
    """Gives the other ranks time to end too; one that waits for us in a collective never will.

    Crashing is then the only way to have Ray Train tear the group down. The next group finds the verdict and returns.
    """
    import ray

    ended, _ = ray.wait([mailbox.all_finished.remote()], timeout=PEER_GRACE_SECONDS)
    if not ended:
        raise RuntimeError("this rank gave up and the others still wait for it")


def run_workers(
    train: Callable[[Any, Report], None],
    payload: Any,
    *,
    config: ClusterConfig,
    name: str,
    on_progress: Callable[[dict[str, Any]], None],
) -> None:
    """Runs ``train(payload, report)`` once on each of ``config.training_workers`` ranks of one process group.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set and torch.distributed is initialised (gloo, or
    nccl with GPUs). A rank that crashes or is killed restarts the whole group, at most ``config.max_failures`` times;
    ``train`` resumes from its own checkpoints. SIGTERM or SIGINT here sets ``report.stop_requested``.

    Args:
        train: picklable; ends early by raising a ClipmillError, which is raised here as itself and not retried.
        payload: picklable; absolute URLs only, for workers start in a folder of their own.
        config: where and how many.
        name: of the run, for Ray's own logs.
        on_progress: called here with the newest dict of each rank that sent one since the last call (about 2 Hz).

    Raises:
        Interrupted: the ranks stopped after a clean checkpoint.
        UserError: raised by a rank, or the workers cannot be placed.
        StageFailed: raised by a rank, or the group failed more than ``max_failures`` times.
    """
    with connect(config), stop_signals() as stop:
        bundle = _training_bundle(config)
        require_capacity(config, bundle, config.training_workers, waited_seconds=0)
        mailbox = start_mailbox(config.training_workers)
        task = {"mailbox": mailbox, "train": train, "payload": payload, "num_threads": max(1, int(bundle["CPU"]))}
        storage = ScratchFolder("train")
        fit = _Fit(config, bundle, task, name, str(storage.path))
        try:
            verdict = _watch(fit, mailbox, config, bundle, stop, on_progress)
        finally:
            fit.abandon(mailbox)
            storage.close()
    if verdict is not None:
        raise cluster_error(*verdict)
    if fit.error is not None:
        raise StageFailed(f"{name}: training workers failed: {_reason(fit.error)}") from fit.error


def _training_bundle(config: ClusterConfig) -> dict[str, float]:
    """What one training worker asks for; CPUs by default an even share that the nodes can hold."""
    num_gpus = 1.0 if config.use_gpu else 0.0
    if config.training_cpus is not None:
        return {"CPU": float(config.training_cpus), "GPU": num_gpus}
    nodes = living_nodes()
    most = int(max((node.resources.get("CPU", 0) for node in nodes), default=1))
    for num_cpus in range(most, 1, -1):
        if num_bundles({"CPU": num_cpus, "GPU": num_gpus}, nodes) >= config.training_workers:
            return {"CPU": float(num_cpus), "GPU": num_gpus}
    return {"CPU": 1.0, "GPU": num_gpus}


def _trainer(base: type, mailbox: ActorHandle) -> type:
    """A trainer whose controller can be ended, and without Ray Train's detached cleaner of placement groups.

    They go with the driver anyway, and without a dashboard the cleaner complains on the terminal every second.
    Private API: should it be renamed, the noise comes back, and a training that is stopped while it waits for a node
    can end with Ray's status (tests listen for both).
    """
    own: list[Any] = []
    with contextlib.suppress(ImportError):
        from ray.train.v2._internal.execution.callback import ControllerCallback

        class Introduction(ControllerCallback):
            def after_controller_start(self, train_run_context: Any) -> None:
                import ray

                mailbox.introduce.remote(ray.get_runtime_context().current_actor)

        own.append(Introduction())

    class Trainer(base):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"] + own

    return Trainer


class _Fit:
    """Ray Train's blocking ``fit`` in a thread of its own, so that the driver stays awake for signals."""

    def __init__(self, config: ClusterConfig, bundle: dict[str, float], task: dict[str, Any], name: str, storage: str):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(GROUP_START_TIMEOUT_SECONDS))
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
        # It tells train functions of nodes about to go; ours restart from their checkpoints and do not ask.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        import ray.train
        import ray.train.torch

        environment = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(task["num_threads"])}
        if not config.use_gpu:
            # Ray shows a worker that asked for none of the GPUs all of them.
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._trainer = _trainer(ray.train.torch.TorchTrainer, task["mailbox"])(
            # As train_loop_config it would be unpickled, and the stage imported, in Ray Train's controller as well.
            functools.partial(_run_rank, task),
            torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.training_workers,
                use_gpu=config.use_gpu,
                resources_per_worker={name: amount for name, amount in bundle.items() if amount},
            ),
            run_config=ray.train.RunConfig(
                # A name that Ray Train has seen resumes that run in silence: ours are used once.
                name=f"{name}-{uuid.uuid4().hex[:8]}",
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                worker_runtime_env={"env_vars": environment},
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ray-train-fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error

    def wait(self, timeout_seconds: float) -> bool:
        """Whether the run has ended, waiting so long for it at most."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def abandon(self, mailbox: ActorHandle) -> None:
        """Leaves a run that still goes on, asking its ranks to stop: without the mailbox they see no driver.

        The thread must end too: what it asks of Ray after the connection was closed would end this process at once,
        with a status of Ray's.
        """
        import ray

        if self._thread.is_alive():
            mailbox.request_stop.remote()
            self._thread.join(PEER_GRACE_SECONDS)
        if self._thread.is_alive():
            with contextlib.suppress(ray.exceptions.RayError):  # the mailbox can be what failed
                controller = ray.get(mailbox.controller.remote(), timeout=PEER_GRACE_SECONDS)
                if controller is not None:
                    ray.kill(controller)
                    self._thread.join(PEER_GRACE_SECONDS)
        ray.kill(mailbox)


def _watch(
    fit: _Fit,
    mailbox: ActorHandle,
    config: ClusterConfig,
    bundle: dict[str, float],
    stop: threading.Event,
    on_progress: Callable[[dict[str, Any]], None],
) -> tuple[str, str] | None:
    """Relays progress and signals until the run has ended; returns the verdict of the ranks."""
    import ray

    next_look = time.monotonic() + WAIT_WARNING_SECONDS
    homeless_since: float | None = time.monotonic()
    relayed = False
    while True:
        ended = fit.wait(POLL_SECONDS)
        progress, started, verdict = ray.get(mailbox.take.remote())
        for update in progress:
            on_progress(update)
        if ended:
            return verdict
        if stop.is_set() and not relayed:
            logger.warning("stopping: the training workers finish a checkpoint first")
            ray.get(mailbox.request_stop.remote())
            relayed = True
        if not started and relayed:
            return ("Interrupted", "stopped before the training began; submit the same command again")
        # A node died: nobody is there to checkpoint.
        if relayed and num_bundles(bundle, living_nodes()) < config.training_workers:
            return verdict or ("Interrupted", "stopped while a node was missing; submit the same command again")
        if (now := time.monotonic()) < next_look:
            continue
        next_look = now + WAIT_WARNING_SECONDS
        if started and num_bundles(bundle, living_nodes()) >= config.training_workers:
            homeless_since = None
            continue
        # Not yet placed, or a node died: then Ray Train waits for another one in silence, and without an end.
        homeless_since = homeless_since or now
        require_capacity(config, bundle, config.training_workers, now - homeless_since)
        logger.warning("training: %s", waiting_message(bundle, config.training_workers, now - homeless_since))


def _reason(error: Exception) -> str:
    """The line of a Ray Train failure that names the cause: an exception of a rank rather than a dead process."""
    failures = sorted(getattr(error, "worker_failures", {}).items(), key=lambda item: (is_death(item[1]), item[0]))
    if not failures:
        return last_line(error)
    rank, failure = failures[0]
    return f"rank {rank}: {death(failure) if is_death(failure) else f'{type(failure).__name__}: {last_line(failure)}'}"
