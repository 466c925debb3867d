"""What a training run tells while it runs: metrics.jsonl, TensorBoard, the status line."""

from __future__ import annotations

import logging
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.tensorboard import SummaryWriter

from clipmill import storage
from clipmill.metrics import MetricsLog, read_metrics

__all__ = ["Report", "Stopwatch", "Telemetry", "summarise"]

UPLOAD_SECONDS = 30.0
"""How often records are published: buckets cannot append, so each time as whole files."""

logger = logging.getLogger(__name__)


class Report(Protocol):
    """The line between a training worker and whoever started it."""

    @property
    def stop_requested(self) -> bool:
        """Whether the run was asked to stop: it should checkpoint and raise `Interrupted`."""

    def update(self, facts: dict[str, Any]) -> None:
        """Hands over the newest progress, ``{"step", "total", ...}``, without waiting."""


class Stopwatch:
    """Rate of the loop since the last look, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self._began = time.perf_counter()
        self._waited, self._clips = 0.0, 0

    def add_step(self, clips: int, waited_seconds: float) -> None:
        """Counts one step on ``clips`` clips of all ranks that had to wait for its data."""
        self._clips += clips
        self._waited += waited_seconds

    def facts(self) -> dict[str, float]:
        """Rate and share of this window."""
        seconds = time.perf_counter() - self._began
        return {
            "clips_per_second": self._clips / seconds,
            "data_wait_share": self._waited / seconds,
            "memory_bytes": _memory_bytes(),
        }


def _memory_bytes() -> int:
    """Most memory this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Telemetry:
    """Rank 0's records of one attempt.

    Args:
        folder_url: the training folder.
        attempt: name of the attempt.
        steps: length of the run.
        report: shows the progress.
    """

    def __init__(self, folder_url: str, attempt: str, steps: int, report: Report) -> None:
        self._steps, self._report = steps, report
        self._metrics = MetricsLog(folder_url, attempt)
        self._tensorboard_url = storage.join(folder_url, "tensorboard", attempt)
        self._events = tempfile.TemporaryDirectory(prefix="clipmill-events-")
        self._writer = SummaryWriter(self._events.name)
        self._uploaded = time.monotonic()

    def log(self, step: int, split: str, facts: dict[str, float]) -> None:
        """Records the facts of one split after ``step`` steps and shows the important ones."""
        self._metrics.write({"step": step, "split": split, **facts})
        for name, value in facts.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.upload()
        if split == "train":
            self.progress(step, loss=facts["loss"])
        else:
            self.progress(step, val_loss=facts["loss"])

    def progress(self, step: int, **facts: float) -> None:
        """Moves the progress bar."""
        self._report.update({"step": step, "total": self._steps, **facts})

    def upload(self) -> None:
        """Publishes everything recorded so far.

        Called before each commit too: a checkpoint must not be ahead of its curve, which a resumed run goes on from.
        """
        self._uploaded = time.monotonic()
        try:
            self._metrics.upload()
            self._writer.flush()
            for path in Path(self._events.name).iterdir():
                storage.publish_file(path, storage.join(self._tensorboard_url, path.name))
        except OSError as error:  # no reason to lose the training: the next upload has it all
            logger.warning("cannot upload metrics: %s", error)

    def close(self) -> None:
        """Publishes everything recorded and removes the local files."""
        self._writer.close()
        self.upload()
        self._metrics.close()
        self._events.cleanup()


def summarise(folder_url: str) -> dict[str, Any]:
    """The numbers of a training folder's metrics that a summary shows."""
    records = read_metrics(folder_url)
    train = [record for record in records if record["split"] == "train"]
    val = [record for record in records if record["split"] == "val"]
    summary: dict[str, Any] = {"steps": train[-1]["step"], "loss": train[-1]["loss"]} if train else {}
    if train:
        for name in ("clips_per_second", "data_wait_share"):
            summary[name] = statistics.median(record[name] for record in train)
    if val:
        summary["val_loss"] = val[-1]["loss"]
    return summary
