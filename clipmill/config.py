"""The one configuration of a run: sections, defaults, units, and which keys identify data on disk.

``clipmill STAGE --config run.yaml [section.key=value ...]``: YAML files merge left to right, then the
assignments, then pydantic checks the result (an unknown key is an error).

Every key is *identity* unless it is marked ``FREE``. Identity keys enter the fingerprint of what a stage
writes: running the stage again over its own output with another value is refused, naming the keys.
Free keys (batch size of a fan-out stage, logging, number of steps, learning rate) may change at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clipmill.errors import UserError

__all__ = [
    "FREE",
    "ClipConfig",
    "ClusterConfig",
    "DataConfig",
    "EvaluateConfig",
    "PriorConfig",
    "PriorModelConfig",
    "RunConfig",
    "SampleConfig",
    "Section",
    "SourceConfig",
    "TokenizeConfig",
    "TrainingConfig",
    "VQVAEConfig",
    "VQVAEModelConfig",
    "VQVAETrainingConfig",
    "changed_keys",
    "fingerprint",
    "identity",
    "load_config",
]


class _Free:
    """Marks a key that may change without changing the identity of what is on disk."""

    def __repr__(self) -> str:
        return "FREE"


FREE = _Free()

PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A group of keys; unknown keys are errors and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Section):
    """Where the raw videos are."""

    type: Literal["folder"] = "folder"
    url: Annotated[str, FREE] = ""
    """Folder or bucket prefix, searched recursively. Free: a moved corpus is the same corpus."""
    label: Literal["parent_folder", "none"] = "parent_folder"
    """``parent_folder``: the name of the folder that holds the file, none for files directly under ``url``."""
    actions_suffix: str | None = None
    """``.actions.npy``: where ``x.actions.npy`` lies beside ``x.mp4``, it holds the video's actions, float32
    [num_frames, action_dim]; its clips carry theirs. A video without such a file has none."""


class ClipConfig(Section):
    """Which frames become a clip, and at which size."""

    num_frames: PositiveInt = 16
    frame_stride: PositiveInt = 1
    """Every n-th frame of the video enters the clip (native frame rate, presentation order)."""
    clip_stride: PositiveInt | None = None
    """Frames of the video between the starts of two clips; none: clips do not overlap."""
    max_clips_per_video: PositiveInt | None = None
    resolution: PositiveInt = 64
    """Height and width of a clip in pixels."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """``crop``: resize the shorter side, centre crop. ``pad``: resize the longer side, pad with black."""

    @property
    def span(self) -> int:
        """Frames of the video that one clip covers."""
        return (self.num_frames - 1) * self.frame_stride + 1

    @property
    def step(self) -> int:
        """Frames of the video between the starts of two clips."""
        return self.clip_stride or self.num_frames * self.frame_stride


class DataConfig(Section):
    """Stage ``shard``: raw videos become clip shards."""

    source: SourceConfig = SourceConfig()
    clip: ClipConfig = ClipConfig()
    format: Literal["mp4", "npy"] = "mp4"
    """``mp4``: h264, small. ``npy``: lossless uint8 [num_frames, height, width, 3]."""
    crf: Annotated[int, Field(ge=0, le=51)] = 16
    """Constant rate factor of the h264 clips: lower is better and larger."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the videos in the split ``val``, chosen by a hash of each video's identity."""
    unit_bytes: PositiveInt = 256 * 2**20
    """Source bytes in one unit of work (whole videos)."""
    shard_bytes: PositiveInt = 128 * 2**20
    """A unit closes a tar when it reaches this size."""
    cpu_seconds_per_video: Annotated[PositiveInt, FREE] = 3600
    memory_bytes_per_video: Annotated[PositiveInt, FREE] = 4 * 2**30
    """Address space of the decoding child beyond what it has at its start."""
    no_progress_seconds: Annotated[PositiveInt, FREE] = 120
    """A decoding child that delivers nothing for so long is killed."""
    max_failed_videos: Annotated[int, Field(ge=0), FREE] = 10
    max_failed_share: Annotated[float, Field(ge=0, le=1), FREE] = 0.05
    """The stage stops when more than max(max_failed_videos, max_failed_share of those finished) failed."""


class TrainingConfig(Section):
    """What the two training stages share."""

    steps: Annotated[PositiveInt, FREE] = 100_000
    global_batch: PositiveInt = 32
    """Clips a step, over all ranks and micro-steps."""
    micro_batch: PositiveInt | None = None
    """Clips a rank takes through the model at once; none: its whole share of the global batch."""
    lr: Annotated[float, Field(gt=0), FREE] = 3e-4
    warmup_steps: Annotated[int, Field(ge=0), FREE] = 0
    schedule: Annotated[Literal["cosine", "constant"], FREE] = "cosine"
    min_lr_share: Annotated[float, Field(ge=0, le=1), FREE] = 0.0
    """The cosine ends at this share of ``lr``."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], FREE] = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    shuffle_window: PositiveInt = 4096
    """Samples of one stream that are permuted among themselves (see ``clipmill/shards/order.py``)."""
    loader_workers: Annotated[int, Field(ge=0), FREE] = 1
    cache_bytes: Annotated[PositiveInt, FREE] = 64 * 2**30
    """Local disk that a node may fill with downloaded shards."""
    log_every: Annotated[PositiveInt, FREE] = 10
    val_every: Annotated[PositiveInt, FREE] = 1000
    val_clips: Annotated[PositiveInt, FREE] = 256
    """Clips of the split ``val`` that a periodic validation reads."""
    checkpoint_every: Annotated[PositiveInt, FREE] = 1000
    keep_last: Annotated[PositiveInt, FREE] = 2
    deepspeed: Annotated[dict[str, Any], FREE] = Field(default_factory=dict)
    """Merged over the DeepSpeed config that ours becomes, for experts."""


class VQVAEModelConfig(Section):
    """The tokenizer (VideoGPT, arXiv 2104.10157, section 3.1)."""

    hidden_dim: PositiveInt = 240
    num_res_layers: Annotated[int, Field(ge=0)] = 4
    num_heads: PositiveInt = 2
    """Heads of the axial attention."""
    axial_attention: bool = True
    embedding_dim: PositiveInt = 256
    num_codes: Annotated[int, Field(ge=2)] = 2048
    downsample: tuple[PositiveInt, PositiveInt, PositiveInt] = (4, 4, 4)
    """Frames, height, width per latent; each a power of two."""
    commitment_cost: Annotated[float, Field(ge=0)] = 0.25
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    restart_share: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """A code used less than this share of its even part (tokens a step / codes) restarts from data."""

    @field_validator("downsample")
    @classmethod
    def _powers_of_two(cls, downsample: tuple[int, int, int]) -> tuple[int, int, int]:
        if any(factor & (factor - 1) for factor in downsample):
            raise ValueError(f"downsample {downsample} must be powers of two, such as (4, 4, 4) or (1, 4, 4)")
        return downsample


class VQVAETrainingConfig(TrainingConfig):
    """Training of the tokenizer, with the paper's learning rate."""

    lr: Annotated[float, Field(gt=0), FREE] = 7e-4


class VQVAEConfig(Section):
    """Stage ``train-vqvae``."""

    model: VQVAEModelConfig = VQVAEModelConfig()
    training: VQVAETrainingConfig = VQVAETrainingConfig()


class TokenizeConfig(Section):
    """Stage ``tokenize``: clip shards become token shards."""

    tokenizer: str = "vqvae"
    """Export to encode with: a name under ``root`` or a URL of a training folder or of one export."""
    batch_size: Annotated[PositiveInt, FREE] = 16


class PriorModelConfig(Section):
    """The prior (VideoGPT, arXiv 2104.10157, section 3.2)."""

    hidden_dim: PositiveInt = 576
    num_heads: PositiveInt = 4
    num_layers: PositiveInt = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    class_conditional: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> PriorModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of num_heads {self.num_heads}")
        return self


class PriorConfig(Section):
    """Stage ``train-prior``."""

    model: PriorModelConfig = PriorModelConfig()
    training: TrainingConfig = TrainingConfig()


class SampleConfig(Section):
    """Stage ``sample``: videos from the newest export of the prior."""

    name: str = "default"
    """Samples go to ``samples/NAME`` under ``root``."""
    num_samples: Annotated[PositiveInt, FREE] = 64
    seed: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    classes: list[str] | None = None
    """Names of classes to draw from in turn; none: all of them in turn."""
    batch_size: PositiveInt = 16
    """Identity: samples are bit-identical at the recorded batch size, precision and hardware class."""

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"sample.name {name!r} must be a plain folder name")
        return name


class EvaluateConfig(Section):
    """Stage ``evaluate``."""

    batch_size: Annotated[PositiveInt, FREE] = 16
    max_clips: Annotated[PositiveInt, FREE] = 2048
    """Clips of the split ``val`` (and of ``train``, for the table baselines) that are read."""


class ClusterConfig(Section):
    """Where the work runs. Nothing here changes what is written."""

    address: Annotated[str | None, FREE] = None
    """Address of a running Ray cluster; none: ``RAY_ADDRESS``, else an embedded Ray."""
    training_launcher: Annotated[Literal["ray", "process"], FREE] = "ray"
    """``process``: train in this process, without Ray. Under torchrun, and without Ray installed, that is so anyway."""
    num_cpus: Annotated[PositiveInt | None, FREE] = None
    """CPUs of the embedded Ray; none: all of this machine."""
    fanout_workers: Annotated[PositiveInt | None, FREE] = None
    """Workers of shard, tokenize and sample; none: as many as the cluster's CPUs (or GPUs) hold."""
    fanout_cpus: Annotated[PositiveInt, FREE] = 1
    """CPUs, and so threads, of one such worker."""
    training_workers: Annotated[PositiveInt, FREE] = 1
    training_cpus: Annotated[PositiveInt | None, FREE] = None
    """CPUs of one training worker; none: its even share of the cluster."""
    use_gpu: Annotated[bool, FREE] = False
    """Give each training, tokenize and sample worker one GPU."""
    max_failures: Annotated[int, Field(ge=0), FREE] = 3
    """How often a failed unit or a failed group of training workers is tried again."""


class RunConfig(Section):
    """One run: a root folder and a section for each stage."""

    root: Annotated[str, FREE]
    """URL of the run's folder: ``runs/demo``, ``s3://bucket/runs/bair``."""
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    vqvae: VQVAEConfig = VQVAEConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    prior: PriorConfig = PriorConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    def folder(self, *names: str) -> str:
        """URL of a folder of this run."""
        return "/".join([self.root.rstrip("/"), *names])

    @property
    def tokenizer_url(self) -> str:
        """Where the tokenizer's export is."""
        return self.tokenize.tokenizer if "/" in self.tokenize.tokenizer else self.folder(self.tokenize.tokenizer)


def load_config(files: Sequence[str | Path], assignments: Sequence[str] = ()) -> RunConfig:
    """Merges YAML files left to right, then ``section.key=value`` assignments, and validates the result.

    Raises:
        UserError: a file is missing or no YAML, an assignment has no ``=``, a key is unknown or a value invalid.
    """
    merged = OmegaConf.create({})
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"config file {file} does not exist; name a YAML file with --config")
        merged = _merge(merged, f"config file {file}", partial(OmegaConf.load, file))
    for assignment in assignments:
        if "=" not in assignment or assignment.startswith("="):
            raise UserError(f"cannot read {assignment!r}: write section.key=value")
        merged = _merge(merged, repr(assignment), partial(OmegaConf.from_dotlist, [assignment]))
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation such as ${rooot}
        raise UserError(f"config: {_first_line(error)}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def _merge(merged: DictConfig, source: str, load: Callable[[], Any]) -> DictConfig:
    try:
        return DictConfig(OmegaConf.merge(merged, load()))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"cannot read {source}: {_first_line(error)}; it must hold sections and keys") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _explain(error: ValidationError) -> str:
    """One line for all problems of a configuration."""
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown key {key}{_suggest(problem['loc'])}")
        elif problem["type"] == "missing":
            problems.append(f"{key} is required (add {key}=VALUE)")
        else:
            problems.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
    return "config: " + "; ".join(problems)


def _suggest(location: tuple[int | str, ...]) -> str:
    """The keys that the section of a misspelt key does know."""
    section: Any = RunConfig
    for part in location[:-1]:
        field = (
            section.model_fields.get(str(part)) if isinstance(section, type) and issubclass(section, Section) else None
        )
        if field is None:
            return ""
        section = field.annotation
    if not (isinstance(section, type) and issubclass(section, Section)):
        return ""
    return f" (known here: {', '.join(section.model_fields)})"


def identity(section: Section) -> dict[str, Any]:
    """The identity keys of a section as plain JSON values, nested sections included."""
    keys: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        if any(isinstance(mark, _Free) for mark in field.metadata):
            continue
        value = getattr(section, name)
        keys[name] = identity(value) if isinstance(value, Section) else json.loads(json.dumps(value))
    return keys


def fingerprint(document: Any) -> str:
    """SHA-256 (hex) of a JSON document in canonical form: sorted keys, no spaces."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def changed_keys(recorded: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Names the identity keys whose values differ, as ``section.key (recorded -> wanted)``."""
    changes = []
    for key in sorted(recorded.keys() | wanted.keys()):
        old, new = recorded.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} ({old!r} -> {new!r})")
    return changes
