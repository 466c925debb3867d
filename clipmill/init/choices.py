"""Chooses the settings of a run from the survey of its videos and from the machine, with a reason for each."""

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
from clipmill.init.survey import OpenedVideo, Survey
from clipmill.pipeline.planning.generation import split_share

__all__ = ["Choices", "Machine", "choose", "this_machine"]

CLIP_FRAMES = 16
LOW_FPS = 12
"""Frames per second of clips from ordinary footage, so that 16 frames last 1.3 s."""
NATIVE_FPS = 16
"""Footage up to this rate keeps its rate."""
WANTED_CLIPS = 600
"""Clips overlap if the footage would otherwise yield fewer than this."""
MOST_CLASSES = 1000
_KEPT_FOOTAGE = 0.9
"""At least this share of the footage must be in videos that are long enough for a clip."""
_SHORT_SIDE_MULTIPLE = 8
"""Both sides of a clip are multiples of this, because all downsampling factors that are chosen here divide it."""


class Machine(NamedTuple):
    """The machine that will train."""

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
        settings: nested settings, as in a config file.
        reasons: reasons for some keys, by their dotted path.
        num_clips: expected number of clips, over both splits.
        num_val_clips: expected number of clips in the split val.
        spans: rows of a table that cuts the only video into one part for each split; empty for several videos.
    """

    settings: dict[str, Any]
    reasons: dict[str, str]
    num_clips: int = 0
    num_val_clips: int = 0
    spans: list[dict[str, Any]] = field(default_factory=list)

    def set(self, key: str, value: Any, reason: str | None = None) -> None:
        """Sets the key ``a.b.c``, with an optional reason."""
        *sections, name = key.split(".")
        place = self.settings
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        if reason is not None:
            self.reasons[key] = reason


def choose(survey: Survey, machine: Machine, root: str) -> Choices:
    """Chooses settings for these videos that this machine can train. Steps are set later, once they have been timed.

    Raises:
        UserError: the videos are too few or too short for training and validation.
    """
    choices = Choices(_model_settings(machine), {})
    choices.settings = {"root": root, "data": {"source": {"url": survey.url}}, **choices.settings}
    _choose_clips(choices, survey, machine)
    _choose_split(choices, survey)
    _choose_classes(choices, survey)
    _choose_place(choices, survey, machine)
    return choices


def _model_settings(machine: Machine) -> dict[str, Any]:
    """Settings of models and optimizers, from the shipped config for this kind of machine."""
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
    num_frames, fps, reason = _frames_and_fps(survey.opened)
    choices.set("data.clip.num_frames", num_frames)
    if fps is not None:
        choices.set("data.clip.fps", fps, reason)
    rate = fps or statistics.median(video.fps for video in survey.opened)
    choices.set("data.clip.resolution", *_resolution(survey.opened, machine))
    total_frames = survey.total_seconds * rate
    stride = next((s for s in (num_frames, 8, 4) if total_frames / s >= WANTED_CLIPS), 2)
    stride = min(stride, num_frames)
    if stride < num_frames:
        choices.set(
            "data.clip.clip_stride",
            stride,
            f"clips overlap: without overlap there would be {_about(total_frames / num_frames)}",
        )
    per_video = max(survey.mean_seconds * rate - num_frames, 0) / stride + 1
    choices.num_clips = max(round(survey.num_videos * per_video), 1)


def _frames_and_fps(opened: list[OpenedVideo]) -> tuple[int, float | None, str]:
    """Frames of a clip, its frame rate (None keeps every frame), and the reason."""
    rates = [video.fps for video in opened]
    slowest, fastest = min(rates), max(rates)
    is_one_rate = fastest < 1.02 * slowest
    wanted: list[tuple[int, float | None, str]] = []
    if not is_one_rate or slowest > NATIVE_FPS:
        found = f"{slowest:.3g}" if is_one_rate else f"{slowest:.3g} to {fastest:.3g}"
        low = min(LOW_FPS, math.floor(slowest)) or slowest
        wanted.append((CLIP_FRAMES, float(low), f"the videos have {found} fps"))
    same = None if is_one_rate else float(round(slowest, 2))
    wanted += [
        (frames, same, "the rate of the slowest video, because the videos are short") for frames in (CLIP_FRAMES, 8, 4)
    ]
    for num_frames, fps, reason in wanted:
        long_enough = [
            video for video in opened if video.seconds is None or video.seconds * (fps or video.fps) >= num_frames
        ]
        footage = sum(video.seconds or 0 for video in long_enough)
        if long_enough and footage >= _KEPT_FOOTAGE * sum(video.seconds or 0 for video in opened):
            return num_frames, fps, reason
    seconds = statistics.median(video.seconds for video in opened if video.seconds is not None)
    raise UserError(
        f"the videos are too short for clips of {wanted[-1][0]} frames: half of them last {seconds:.2g} s or less; "
        "add longer videos"
    )


def _resolution(opened: list[OpenedVideo], machine: Machine) -> tuple[int | list[int], str]:
    """The size of a clip, with the aspect ratio of most videos, and the reason."""
    aspect = statistics.median(video.width / video.height for video in opened)
    pixels = min(
        (128 if machine.num_gpus else 64) ** 2, statistics.median(video.width * video.height for video in opened)
    )
    unit = _SHORT_SIDE_MULTIPLE
    height = max(unit, unit * round(math.sqrt(pixels / aspect) / unit))
    width = max(unit, unit * round(height * aspect / unit))
    sizes = sorted({(video.width, video.height) for video in opened}, key=lambda size: size[0] * size[1])
    (least_width, least_height), (most_width, most_height) = sizes[0], sizes[-1]
    found = f"{least_width} x {least_height}" + (f" to {most_width} x {most_height}" if len(sizes) > 1 else "")
    reason = f"height, width; the videos are {found} (width x height)"
    return (height, "the videos are " + found) if height == width else ([height, width], reason)


# ------------------------------------------------------------------------------------------------- splits


def _choose_split(choices: Choices, survey: Survey) -> None:
    """Ensures that both splits have videos; with few videos, a random split might leave one empty."""
    if survey.is_complete:
        long_enough = [video for video in survey.opened if _makes_clips(choices, video)]
        shares = sorted({split_share(0, video.origin) for video in long_enough})
        if len(shares) > 1:
            choices.set("data.val_fraction", _val_fraction(shares), "so that both splits have videos")
        else:
            _cut_the_only_video(choices, (long_enough or survey.opened)[0])
    fraction = choices.settings["data"].get("val_fraction", 0.1)
    choices.num_val_clips = max(1, round(choices.num_clips * fraction))


def _makes_clips(choices: Choices, video: OpenedVideo) -> bool:
    return video.seconds is None or video.seconds >= _clip_seconds(choices, video)


def _clip_seconds(choices: Choices, video: OpenedVideo) -> float:
    clip = choices.settings["data"]["clip"]
    return float(clip["num_frames"] / (clip.get("fps") or video.fps))


def _val_fraction(shares: list[float]) -> float:
    """The fraction nearest to 0.1 that lies between the lowest and the highest of these sorted shares.

    Videos whose share is below it go to val, the others to train.
    """
    low, high = next((pair for pair in itertools.pairwise(shares) if pair[1] > 0.1), tuple(shares[-2:]))
    if low < 0.1 < high:
        return 0.1
    middle = (low + high) / 2
    return round(middle, 3) if low < round(middle, 3) < high else middle


def _cut_the_only_video(choices: Choices, video: OpenedVideo) -> None:
    needed = 5 * _clip_seconds(choices, video)
    if video.seconds is None or video.seconds < needed:
        found = "states no duration" if video.seconds is None else f"lasts {video.seconds:.3g} s"
        raise UserError(
            f"{video.name} is the only video that yields clips, and too short to be cut into a part for training "
            f"and one for validation: it {found}, and {needed:.3g} s are needed; add videos"
        )
    cut = round(0.8 * video.seconds, 3)
    # By default the spans of one file share an origin and therefore a split; explicit groups prevent that.
    choices.spans = [
        {"url": video.url, "end": cut, "split": "train", "group": "train"},
        {"url": video.url, "start": cut, "split": "val", "group": "val"},
    ]


# ------------------------------------------------------------------------------------------------- the rest


def _choose_classes(choices: Choices, survey: Survey) -> None:
    """Makes the prior class-conditional if every video has a class and classes have several videos."""
    from_sidecars = {video.label for video in survey.opened} - set(survey.folder_labels)
    labels: Mapping[str | None, Any] = survey.folder_labels
    num_classes = len(set(labels) | from_sidecars)
    every_video_has_one = None not in labels and None not in {video.label for video in survey.opened}
    is_shared = 2 <= num_classes <= min(MOST_CLASSES, survey.num_videos / 2)
    if every_video_has_one and is_shared and not choices.spans:
        choices.set("prior.model.class_conditional", True, f"{num_classes} classes, from the folders' names")
        return
    if not choices.spans:
        reason = (
            "too few videos in each folder for classes" if every_video_has_one else "some videos are in no class folder"
        )
        choices.set("data.source.label", "none", reason)


def _choose_place(choices: Choices, survey: Survey, machine: Machine) -> None:
    """Chooses the size of shards, the clips to evaluate, and the workers."""
    height_width = choices.settings["data"]["clip"]["resolution"]
    pixels = height_width**2 if isinstance(height_width, int) else height_width[0] * height_width[1]
    frames = choices.settings["data"]["clip"]["num_frames"]
    sizes = [video.clip_bytes for video in survey.opened if video.clip_bytes]
    clip_bytes = statistics.fmean(sizes) * pixels * frames / (64 * 64 * 16) if sizes else 0
    wanted_shards = 2 * machine.num_cpus
    shard_bytes = int(choices.num_clips * clip_bytes / wanted_shards)
    if 4 * 2**20 < shard_bytes < 128 * 2**20:
        reason = f"about {wanted_shards} shards, so that all {machine.num_cpus} CPUs have work"
        choices.set("data.shard_bytes", shard_bytes, reason)
    if choices.num_val_clips > 2048:
        choices.set("evaluate.max_clips", 2048, f"out of about {_about(choices.num_val_clips)} in the split val")
    if machine.num_gpus:
        choices.set("cluster.use_gpu", True)
        choices.set("cluster.training_workers", machine.num_gpus, "one for each GPU")
        choices.set("vqvae.training.loader_workers", max(1, min(8, machine.num_cpus // machine.num_gpus - 1)))


def _about(number: float) -> str:
    """Rounds a count to two digits."""
    digits = max(0, len(str(round(number))) - 2)
    return f"{round(number, -digits):,.0f}"
