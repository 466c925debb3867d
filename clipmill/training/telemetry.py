"""Output of a running training: metrics.jsonl, TensorBoard, Weights & Biases if configured, and the status line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import math
import statistics
import textwrap
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from clipmill import storage
from clipmill.config import TrainingConfig
from clipmill.errors import UserError
from clipmill.metrics import MetricsLog, read_metrics
from clipmill.scratch import ScratchFolder
from clipmill.training.previews import Preview, Studio

__all__ = ["Report", "Telemetry", "require_wandb", "summarise"]

UPLOAD_SECONDS = 30.0
"""Seconds between two uploads. Each upload writes whole files, because buckets cannot append."""
WANDB_NAME_LENGTH = 128
"""Maximum that Weights & Biases accepts."""
_STATUS = (
    "loss",
    "tokens_per_second",
    "clips_per_second",
    "mfu",
    "grad_norm",
    "lr",
    "data_wait_share",
    "skipped_steps",
)
"""The facts of a training that the status line shows."""

logger = logging.getLogger(__name__)


class Report(Protocol):
    """The connection between a training worker and the process that started it."""

    @property
    def stop_requested(self) -> bool:
        """Whether the run was asked to stop: it should checkpoint and raise `Interrupted`."""

    def hold_stops(self) -> AbstractContextManager[None]:
        """Inside the block, a stop only sets `stop_requested`; outside, it ends this process at once, with status 75.

        Raises:
            Interrupted: on entry, if the stop was requested before.
        """

    def update(self, facts: dict[str, Any]) -> None:
        """Reports the newest progress, ``{"step", "total", ...}``, without waiting."""


def require_wandb(project: str | None) -> None:
    """If a project is set, checks that Weights & Biases can record. Sends no request.

    Raises:
        UserError: the package is missing, or this machine is not logged in.
    """
    if project is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb_project={project} needs the package wandb; `pip install wandb`, or leave it out")
    wandb = importlib.import_module("wandb")
    if wandb.setup().settings.mode != "online":
        return
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except TypeError:  # older versions can only prompt; their `init` will report a missing login
        return
    if not logged_in:
        raise UserError(_without_wandb(project, "nobody has logged in on this machine"))


def _without_wandb(project: str, problem: str) -> str:
    return (
        f"wandb_project={project}: {problem}; run `wandb login` or set WANDB_API_KEY, record to a folder with "
        "WANDB_MODE=offline, or leave it out"
    )


class Telemetry:
    """Rank 0's records of one attempt.

    Args:
        folder_url: the training folder.
        attempt: name of the attempt.
        config: of the training.
        report: shows the progress.
        studio: encodes previews as files; None writes none.

    Raises:
        UserError: Weights & Biases is configured and refuses the login.
    """

    def __init__(
        self, folder_url: str, attempt: str, config: TrainingConfig, report: Report, studio: Studio | None = None
    ) -> None:
        self._folder_url, self._steps, self._report, self._studio = folder_url, config.steps, report, studio
        self._shown: dict[str, float | str] = {}
        self._metrics = MetricsLog(folder_url, attempt)
        self._tensorboard_url = storage.join(folder_url, "tensorboard", attempt)
        self._folder = ScratchFolder("events")
        self._events = self._folder.path
        self._writer = SummaryWriter(str(self._events))
        self._published: dict[Path, int] = {}
        hparams = config.model_dump(mode="json")
        self._write_texts(hparams)
        self._wandb: Any = None
        if config.wandb_project is not None:
            wandb = importlib.import_module("wandb")  # not a dependency
            # Each attempt is its own run: W&B drops steps that a resumed run repeats.
            group = folder_url[-WANDB_NAME_LENGTH:]
            try:
                self._wandb = wandb.init(project=config.wandb_project, group=group, name=attempt, config=hparams)
            except wandb.errors.Error as error:
                raise UserError(_without_wandb(config.wandb_project, " ".join(str(error).split()))) from error
        self._uploaded = time.monotonic()

    def log(self, step: int, split: str, facts: dict[str, float]) -> None:
        """Records the finite facts of one split after ``step`` steps, and shows some of them."""
        facts = {name: value for name, value in facts.items() if math.isfinite(value)}  # JSON has no NaN
        self._metrics.write({"step": step, "split": split, **facts})
        for name, value in facts.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in facts.items()}, step=step)
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.upload()
        if split == "train":
            self._shown |= {name: facts[name] for name in _STATUS if name in facts}
            self._shown["memory"] = f"{facts['memory_bytes'] / 2**30:.1f} GiB"
        elif "loss" in facts:
            self._shown["val_loss"] = facts["loss"]
        self.progress(step)

    def _write_texts(self, hparams: dict[str, Any]) -> None:
        """Writes the keys of the training, and the run's config from the training folder."""
        rows = [f"| {name} | {value} |" for name, value in hparams.items()]
        self._writer.add_text("hparams", "\n".join(["| key | value |", "|---|---|", *rows]), 0)
        with contextlib.suppress(FileNotFoundError):
            config = storage.read_bytes(storage.join(self._folder_url, "config.yaml")).decode()
            self._writer.add_text("config", textwrap.indent(config, "    "), 0)  # to Markdown this is code

    def log_preview(self, step: int, name: str, preview: Preview) -> None:
        """Shows a picture, and playable clips, in the folder's ``previews/``, TensorBoard and W&B.

        Each preview has its own event file. The file with the numbers is uploaded whole every time, so it must stay
        small.
        """
        picture, clips, fps = preview
        with SummaryWriter(str(self._events / name), filename_suffix=f".{step:08d}") as writer:
            writer.add_image(name, picture, step, dataformats="HWC")
            if clips is not None:
                writer._get_file_writer().add_summary(_playing(f"{name}_playing", clips, fps), step)
        files = self._studio.encode(preview) if self._studio is not None else {}
        try:
            for kind, content in files.items():
                url = storage.join(self._folder_url, "previews", f"step-{step:08d}.{kind}")
                storage.publish_bytes(url, content)
        except OSError as error:
            logger.warning("cannot write a preview: %s", error)
        if self._wandb is not None:
            wandb = importlib.import_module("wandb")
            shown: dict[str, Any] = {name: wandb.Image(picture)}
            if "mp4" in files:
                shown[f"{name}_playing"] = wandb.Video(io.BytesIO(files["mp4"]), format="mp4")
            self._wandb.log(shown, step=step)

    def progress(self, step: int) -> None:
        """Moves the progress bar."""
        self._report.update({"step": step, "total": self._steps, **self._shown})

    def upload(self) -> None:
        """Publishes everything recorded so far.

        Also called before each commit: a resumed run continues the curve, so the curve must reach the checkpoint.
        """
        self._uploaded = time.monotonic()
        try:
            self._metrics.upload()
            self._writer.flush()
            for path in (path for path in self._events.rglob("*") if path.is_file()):
                size = path.stat().st_size
                if self._published.get(path) != size:
                    name = path.relative_to(self._events).as_posix()
                    storage.publish_file(path, storage.join(self._tensorboard_url, name))
                    self._published[path] = size
        except OSError as error:  # must not end the training; the next upload contains everything
            logger.warning("cannot upload metrics: %s", error)

    def close(self) -> None:
        """Publishes everything recorded and removes the local files."""
        self._writer.close()
        self.upload()
        self._metrics.close()
        self._folder.close()
        if self._wandb is not None:
            self._wandb.finish()


def _playing(name: str, clips: np.ndarray, fps: float) -> Summary:
    """A GIF of clips uint8 [N, T, H, W, 3], side by side. TensorBoard plays it; its own GIF writer needs moviepy."""
    from PIL import Image  # installed with TensorBoard

    frames = [Image.fromarray(np.concatenate(list(frame), axis=1)) for frame in clips.swapaxes(0, 1)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)
    width, height = frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
    return Summary(value=[Summary.Value(tag=name, image=image)])


def summarise(folder_url: str) -> dict[str, Any]:
    """The metrics of a training folder that a summary shows."""
    records = read_metrics(folder_url)
    train = [record for record in records if record["split"] == "train"]
    val = [record for record in records if record["split"] == "val"]
    summary: dict[str, Any] = {"steps": train[-1]["step"]} if train else {}
    losses = [record["loss"] for record in train if "loss" in record]  # records omit a loss that is not finite
    if losses:
        summary["loss"] = losses[-1]
    for name in ("clips_per_second", "tokens_per_second", "mfu", "data_wait_share"):
        if values := [record[name] for record in train if name in record]:
            summary[name] = statistics.median(values)
    if train and train[-1].get("skipped_steps"):
        summary["skipped_steps"] = train[-1]["skipped_steps"]
    if val and "loss" in val[-1]:
        summary["val_loss"] = val[-1]["loss"]
    return summary
