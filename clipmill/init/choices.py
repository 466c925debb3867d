"""From what a survey found and what the machine is to the settings of a run, each with its reason."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clipmill.config import load_config
from clipmill.errors import UserError
from clipmill.init.survey import Look, Survey
from clipmill.pipeline.planning.generation import split_share

__all__ = ["Choices", "Machine", "choose", "this_machine"]

CLIP_FRAMES = 16
LOW_FPS = 12
"""Frames per second of the clips of ordinary footage: 16 of them last 1.3 s."""
NATIVE_FPS = 16
"""Footage of at most this rate is taken as it is."""
WANTED_CLIPS = 600
"""Clips overlap where footage makes fewer."""
MOST_CLASSES = 1000
_KEPT_FOOTAGE = 0.9
"""Share of the footage that must lie in videos that are long enough for a clip."""
_SHORT_SIDE_MULTIPLE = 8
"""Both sides of a clip are multiples of this: all downsampling factors that are chosen here divide it."""


class Machine(NamedTuple):
    """What trains."""

    num_cpus: int
    num_gpus: int
    gpu_name: str
    gpu_bytes: int
    has_bfloat16: bool

    def __str__(self) -> str:
        if not self.num_gpus:
            return f"{self.num_cpus} CPUs, no GPU"
        return f"{self.num_gpus} x {self.gpu_name} with {self.gpu_bytes / 2**30:.0f} GiB, {self.num_cpus} CPUs"


def this_machine() -> Machine:
    """The machine that this process may use."""
    import torch

    num_cpus = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return Machine(num_cpus, 0, "", 0, has_bfloat16=False)
    gpu = torch.cuda.get_device_properties(0)
    return Machine(num_cpus, torch.cuda.device_count(), gpu.name, gpu.total_memory, torch.cuda.is_bf16_supported())


@dataclass
class Choices:
    """Settings of a run.

    Attributes:
        settings: nested, as a config file has them.
        reasons: a sentence for some keys, by their dotted path.
        num_clips: expected, over both splits.
        num_val_clips: expected, of the split val.
        spans: rows of a table that cuts the only video into one part for each split; none for a folder.
    """

    settings: dict[str, Any]
    reasons: dict[str, str]
    num_clips: int = 0
    num_val_clips: int = 0
    spans: list[dict[str, Any]] = field(default_factory=list)

    def set(self, key: str, value: Any, reason: str | None = None) -> None:
        """Sets ``a.b.c``."""
        *sections, name = key.split(".")
        place = self.settings
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        if reason is not None:
            self.reasons[key] = reason


def choose(survey: Survey, machine: Machine, root: str) -> Choices:
    """A config for these videos that this machine can train. Steps are set later, by the time that they take.

    Raises:
        UserError: the videos are too few or too short to train on and to judge by.
    """
    choices = Choices(_model_settings(machine), {})
    choices.settings = {"root": root, "data": {"source": {"url": survey.url}}, **choices.settings}
    _choose_clips(choices, survey, machine)
    _choose_split(choices, survey)
    _choose_classes(choices, survey)
    _choose_place(choices, survey, machine)
    return choices


def _model_settings(machine: Machine) -> dict[str, Any]:
    """Models and optimizers: those of the shipped config that was made for such a machine."""
    shipped = load_config(["ucf101" if machine.num_gpus else "demo"])
    settings = shipped.model_dump(mode="json", exclude_unset=True)
    chosen = {name: settings[name] for name in ("vqvae", "prior", "sample")}
    chosen["prior"]["model"].pop("class_conditional", None)
    if machine.num_gpus:
        chosen["prior"]["model"] = {"preset": "100m"}
        chosen["sample"] = {"num_samples": 64, "batch_size": 16, "top_p": 0.95}
        if machine.has_bfloat16:
            chosen["prior"]["training"]["precision"] = "bfloat16"
    return chosen


# ------------------------------------------------------------------------------------------------- clips


def _choose_clips(choices: Choices, survey: Survey, machine: Machine) -> None:
    num_frames, fps, reason = _frames_and_fps(survey.looks)
    choices.set("data.clip.num_frames", num_frames)
    if fps is not None:
        choices.set("data.clip.fps", fps, reason)
    rate = fps or statistics.median(look.fps for look in survey.looks)
    choices.set("data.clip.resolution", *_resolution(survey.looks, machine))
    num_frames_in_all = survey.total_seconds * rate
    stride = next((s for s in (num_frames, 8, 4) if num_frames_in_all / s >= WANTED_CLIPS), 2)
    stride = min(stride, num_frames)
    if stride < num_frames:
        choices.set(
            "data.clip.clip_stride",
            stride,
            f"clips overlap: apart there would be {_about(num_frames_in_all / num_frames)}",
        )
    per_video = max(survey.mean_seconds * rate - num_frames, 0) / stride + 1
    choices.num_clips = max(round(survey.num_videos * per_video), 1)


def _frames_and_fps(looks: list[Look]) -> tuple[int, float | None, str]:
    """Frames of a clip, its rate (None takes every frame), and why."""
    rates = [look.fps for look in looks]
    slowest, fastest = min(rates), max(rates)
    is_one_rate = fastest < 1.02 * slowest
    wanted: list[tuple[int, float | None, str]] = []
    if not is_one_rate or slowest > NATIVE_FPS:
        found = f"{slowest:.3g}" if is_one_rate else f"{slowest:.3g} to {fastest:.3g}"
        low = min(LOW_FPS, math.floor(slowest)) or slowest
        wanted.append((CLIP_FRAMES, float(low), f"the videos have {found} fps"))
    same = None if is_one_rate else float(round(slowest, 2))
    wanted += [
        (frames, same, "that of the slowest video, since the videos are short") for frames in (CLIP_FRAMES, 8, 4)
    ]
    for num_frames, fps, reason in wanted:
        long_enough = [look for look in looks if look.seconds is None or look.seconds * (fps or look.fps) >= num_frames]
        footage = sum(look.seconds or 0 for look in long_enough)
        if long_enough and footage >= _KEPT_FOOTAGE * sum(look.seconds or 0 for look in looks):
            return num_frames, fps, reason
    seconds = statistics.median(look.seconds for look in looks if look.seconds is not None)
    raise UserError(
        f"the videos are too short for clips of {wanted[-1][0]} frames: half of them last {seconds:.2g} s or less"
    )


def _resolution(looks: list[Look], machine: Machine) -> tuple[int | list[int], str]:
    """The size of a clip in the shape of most videos, and why."""
    aspect = statistics.median(look.width / look.height for look in looks)
    pixels = min((128 if machine.num_gpus else 64) ** 2, statistics.median(look.width * look.height for look in looks))
    unit = _SHORT_SIDE_MULTIPLE
    height = max(unit, unit * round(math.sqrt(pixels / aspect) / unit))
    width = max(unit, unit * round(height * aspect / unit))
    sizes = sorted({(look.width, look.height) for look in looks}, key=lambda size: size[0] * size[1])
    (least_width, least_height), (most_width, most_height) = sizes[0], sizes[-1]
    found = f"{least_width} x {least_height}" + (f" to {most_width} x {most_height}" if len(sizes) > 1 else "")
    reason = f"height, width; the videos are {found} (width x height)"
    return (height, "the videos are " + found) if height == width else ([height, width], reason)


# ------------------------------------------------------------------------------------------------- splits


def _choose_split(choices: Choices, survey: Survey) -> None:
    """Sees to it that both splits have videos, where chance alone might leave one empty."""
    if survey.is_complete:
        long_enough = [look for look in survey.looks if _makes_clips(choices, look)]
        shares = sorted({split_share(0, look.origin) for look in long_enough})
        if len(shares) > 1:
            choices.set("data.val_fraction", _val_fraction(shares), "so that both splits have videos")
        else:
            _cut_the_only_video(choices, (long_enough or survey.looks)[0])
    fraction = choices.settings["data"].get("val_fraction", 0.1)
    choices.num_val_clips = max(1, round(choices.num_clips * fraction))


def _makes_clips(choices: Choices, look: Look) -> bool:
    return look.seconds is None or look.seconds >= _clip_seconds(choices, look)


def _clip_seconds(choices: Choices, look: Look) -> float:
    clip = choices.settings["data"]["clip"]
    return float(clip["num_frames"] / (clip.get("fps") or look.fps))


def _val_fraction(shares: list[float]) -> float:
    """The share nearest to 0.1 that lies between the lowest and the highest of these sorted shares.

    Videos below it are val, the others train.
    """
    low, high = next((pair for pair in itertools.pairwise(shares) if pair[1] > 0.1), tuple(shares[-2:]))
    if low < 0.1 < high:
        return 0.1
    middle = (low + high) / 2
    return round(middle, 3) if low < round(middle, 3) < high else middle


def _cut_the_only_video(choices: Choices, look: Look) -> None:
    needed = 5 * _clip_seconds(choices, look)
    if look.seconds is None or look.seconds < needed:
        found = "states no duration" if look.seconds is None else f"lasts {look.seconds:.3g} s"
        raise UserError(
            f"{look.name} is the only video that makes clips, and too short to train on one part of it and judge by "
            f"the rest: it {found}, and {needed:.3g} s are needed; add videos"
        )
    cut = round(0.8 * look.seconds, 3)
    # Spans of one file are of one origin, hence in one split, unless their rows name others.
    choices.spans = [
        {"url": look.url, "end": cut, "split": "train", "group": "train"},
        {"url": look.url, "start": cut, "split": "val", "group": "val"},
    ]


# ------------------------------------------------------------------------------------------------- the rest


def _choose_classes(choices: Choices, survey: Survey) -> None:
    """Classes, where every video has one and they are shared."""
    from_sidecars = {look.label for look in survey.looks} - set(survey.folder_labels)
    labels: Mapping[str | None, Any] = survey.folder_labels
    num_classes = len(set(labels) | from_sidecars)
    every_video_has_one = None not in labels and None not in {look.label for look in survey.looks}
    is_shared = 2 <= num_classes <= min(MOST_CLASSES, survey.num_videos / 2)
    if every_video_has_one and is_shared and not choices.spans:
        choices.set("prior.model.class_conditional", True, f"{num_classes} classes: the folders' names")
        return
    if not choices.spans:
        reason = (
            "too few videos a folder for classes" if every_video_has_one else "some videos lie in no class's folder"
        )
        choices.set("data.source.label", "none", reason)


def _choose_place(choices: Choices, survey: Survey, machine: Machine) -> None:
    """Units of work, and where it runs."""
    height_width = choices.settings["data"]["clip"]["resolution"]
    pixels = height_width**2 if isinstance(height_width, int) else height_width[0] * height_width[1]
    frames = choices.settings["data"]["clip"]["num_frames"]
    sizes = [look.clip_bytes for look in survey.looks if look.clip_bytes]
    clip_bytes = statistics.fmean(sizes) * pixels * frames / (64 * 64 * 16) if sizes else 0
    wanted_shards = 2 * machine.num_cpus
    shard_bytes = int(choices.num_clips * clip_bytes / wanted_shards)
    if 4 * 2**20 < shard_bytes < 128 * 2**20:
        reason = f"about {wanted_shards} shards, so that all {machine.num_cpus} CPUs have work"
        choices.set("data.shard_bytes", shard_bytes, reason)
    if choices.num_val_clips > 2048:
        choices.set("evaluate.max_clips", 2048, f"of about {_about(choices.num_val_clips)} in the split val")
    if machine.num_gpus:
        choices.set("cluster.use_gpu", True)
        choices.set("cluster.training_workers", machine.num_gpus, "one for each GPU")
        choices.set("vqvae.training.loader_workers", max(1, min(8, machine.num_cpus // machine.num_gpus - 1)))


def _about(number: float) -> str:
    """Two digits of a count."""
    digits = max(0, len(str(round(number))) - 2)
    return f"{round(number, -digits):,.0f}"
