"""``clipmill init``: surveys the videos, chooses settings, estimates their time, and writes the config file."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.init.choices import Choices, Machine, choose, this_machine
from clipmill.init.survey import Survey, survey_videos
from clipmill.init.timing import Timing, measure

__all__ = ["Proposal", "propose"]

_VQVAE_SHARE = 0.4
"""Share of the training time that the tokenizer gets."""
_MOST_EPOCHS = 100
_FEWEST_STEPS, _MOST_STEPS = 300, 100_000
_SECONDS_BETWEEN_CHECKPOINTS = 300


class Proposal(NamedTuple):
    """Result of `propose`.

    Attributes:
        path: path of the config file.
        root: folder of the run.
        survey: the survey of the videos.
        machine: the machine that the config is for.
        stage_seconds: expected time of each stage.
        num_clips: expected number of clips.
    """

    path: Path
    root: str
    survey: Survey
    machine: Machine
    stage_seconds: dict[str, float]
    num_clips: int


def propose(videos: str, out: Path | None, root: str | None, hours: float | None) -> Proposal:
    """Writes a config for a folder, a bucket prefix or one file of videos.

    Args:
        videos: path or URL of the videos.
        out: config file to write; None writes NAME.yaml, where NAME is the folder's name.
        root: folder of the run; None uses runs/NAME.
        hours: time for both trainings; None uses 0.25 hours on CPUs and 4 hours on GPUs.

    Raises:
        UserError: the videos cannot be read or are too few, or ``out`` or the run already exists. Nothing was written.
    """
    name = _name_of(videos)
    path, root = out or Path(f"{name}.yaml"), root or f"runs/{name}"
    _refuse_existing(path, root)
    survey = survey_videos(videos)
    machine = this_machine()
    choices = choose(survey, machine, root)
    if choices.spans:
        choices.settings["data"]["source"] = _table_source(path, choices)
    timing = measure(_config(choices), machine.num_gpus)
    _set_steps(choices, timing, 3600 * (hours or (4 if machine.num_gpus else 0.25)))
    config = _config(choices)
    stage_seconds = _stage_seconds(config, choices, survey, machine, timing)
    if choices.spans:
        _write_table(path.with_suffix(".csv"), choices)
    path.write_text(_document(videos, path, survey, machine, choices, stage_seconds))
    return Proposal(path, root, survey, machine, stage_seconds, choices.num_clips)


def _name_of(videos: str) -> str:
    """A file name made from the last part of a path or URL."""
    url = storage.shown(storage.absolute(videos)).rstrip("/")
    last = url.rsplit("/", 1)[-1]
    if storage.is_local(url) and storage.local_path(url).is_file():
        last = last.rsplit(".", 1)[0]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "videos"


def _refuse_existing(path: Path, root: str) -> None:
    if path.exists():
        raise UserError(f"{path} exists; run it (clipmill run --config {path}), remove it, or name another with --out")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; create it, or name another file with --out")
    if storage.list_folders(storage.absolute(root)):
        raise UserError(f"{root} already holds a run; name another folder with --root")


def _config(choices: Choices) -> RunConfig:
    try:
        return RunConfig.model_validate(choices.settings)
    except ValidationError as error:
        raise AssertionError(f"init chose settings that do not fit each other: {error}") from error


# -------------------------------------------------------------------------------------------------- time


def _set_steps(choices: Choices, timing: Timing, seconds: float) -> None:
    """Sets the numbers of steps that fill the given time, up to `_MOST_EPOCHS` and `_MOST_STEPS`."""
    parts = (
        ("vqvae", timing.vqvae_step, timing.vqvae_micro_batch, _VQVAE_SHARE),
        ("prior", timing.prior_step, timing.prior_micro_batch, 1 - _VQVAE_SHARE),
    )
    for name, step_seconds, micro_batch, share in parts:
        training = choices.settings[name]["training"]
        num_train_clips = max(choices.num_clips - choices.num_val_clips, 1)
        epoch = num_train_clips / training["global_batch"]
        steps = min(seconds * share / step_seconds, _MOST_EPOCHS * epoch, _MOST_STEPS)
        steps = _rounded(max(steps, _FEWEST_STEPS), 2)
        reason = f"{step_seconds:.2g} s a step, {steps / epoch:.2g} epochs"
        choices.set(f"{name}.training.steps", steps, reason)
        every = _rounded(min(max(_SECONDS_BETWEEN_CHECKPOINTS / step_seconds, steps / 20), steps), 1)
        choices.set(f"{name}.training.checkpoint_every", every)
        choices.set(f"{name}.training.val_every", every)
        if micro_batch < training["global_batch"]:
            choices.set(f"{name}.training.micro_batch", micro_batch, "the largest that fits the GPU's memory")


def _stage_seconds(
    config: RunConfig, choices: Choices, survey: Survey, machine: Machine, timing: Timing
) -> dict[str, float]:
    """Expected duration of each stage in seconds."""
    frames = sum(video.fps * (video.seconds or 0) for video in survey.opened) / len(survey.opened) * survey.num_videos
    opened = survey.opened
    per_frame = sum(video.decode_seconds_per_frame for video in opened) / len(opened)
    workers = machine.num_gpus or 1  # without GPUs, one worker was timed with all CPUs
    val_clips = min(choices.num_val_clips, config.evaluate.max_clips or choices.num_val_clips)
    return {
        "shard": frames * per_frame / machine.num_cpus,
        "train-vqvae": config.vqvae.training.steps * timing.vqvae_step,
        "tokenize": choices.num_clips * timing.encode_clip / workers,
        "train-prior": config.prior.training.steps * timing.prior_step,
        "sample": config.sample.num_samples * timing.draw_sample / workers,
        "evaluate": val_clips * (timing.vqvae_clip + timing.prior_clip),
    }


def _rounded(number: float, num_digits: int) -> int:
    """Rounds a number to its first digits, at least to 1."""
    unit = 10 ** max(len(str(int(number))) - num_digits, 0)
    return max(round(number / unit) * unit, 1)


# -------------------------------------------------------------------------------------------------- files


def _table_source(path: Path, choices: Choices) -> dict[str, Any]:
    columns = {"start": "start", "end": "end", "split": "split", "group": "group"}
    choices.reasons["data.source.url"] = "the only video, cut into a part for training and one for validation"
    return {"type": "table", "url": str(path.with_suffix(".csv").absolute()), "columns": columns}


def _write_table(path: Path, choices: Choices) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("url", "start", "end", "split", "group"), lineterminator="\n")
    writer.writeheader()
    for row in choices.spans:
        writer.writerow(row)
    path.write_text(text.getvalue())


def _document(
    videos: str, path: Path, survey: Survey, machine: Machine, choices: Choices, stage_seconds: dict[str, float]
) -> str:
    """The text of the config file."""
    total = sum(stage_seconds.values())
    lines = [
        f"# Written by `clipmill init {storage.shown(videos)}`. Run it: clipmill run --config {path}",
        f"# Expected on this machine ({machine}): {_minutes(total)} of work, timed with these models.",
        "# docs/configuration.md explains every key; `clipmill config --config FILE` prints all of them.",
        *_yaml_lines(choices.settings, choices.reasons, ""),
    ]
    return "\n".join(lines) + "\n"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _yaml_lines(settings: dict[str, Any], reasons: dict[str, str], prefix: str) -> list[str]:
    """Formats nested settings as YAML, with the reasons as comments."""
    lines = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        indent = "  " * key.count(".")
        if isinstance(value, dict):
            lines.append(f"{indent}{name}:")
            lines += _yaml_lines(value, reasons, f"{key}.")
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
        comment = f"  # {reasons[key]}" if key in reasons else ""
        lines.append(f"{indent}{name}: {text}{comment}")
    return lines
