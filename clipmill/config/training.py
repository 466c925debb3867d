"""Sections of the two training stages: ``vqvae`` and ``prior``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from clipmill.config.data import Resolution, frame_size
from clipmill.config.prior import PriorModelConfig
from clipmill.config.section import FREE, PLACE, Place, PositiveInt, Section, changed_keys
from clipmill.config.sharpness import SharpnessConfig
from clipmill.config.vqvae import VQVAEModelConfig

__all__ = [
    "DATASET_KEYS",
    "PriorConfig",
    "PriorTrainingConfig",
    "TrainingConfig",
    "VQVAEConfig",
    "VQVAETrainingConfig",
    "refused_changes",
]

DATASET_KEYS = frozenset({"clips", "tokens"})
"""Keys of a training's identity that hold fingerprints of data sets."""


DEEPSPEED_TWINS = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_batch",
    "gradient_clipping": "grad_clip",
    "optimizer": "lr, betas and weight_decay",
    "scheduler": "lr, warmup_steps, schedule and min_lr_share",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "compile": "compile",
    "checkpoint": "checkpoint_every, keep_last and keep_every",
    "activation_checkpointing": "prior.model.checkpointed_share",
    "wandb": "wandb_project",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.compute_grad_norm": "grad_clip",
    "zero_optimization.cpu_offload": "offload",
    "zero_optimization.offload_optimizer": "offload",
}
"""Keys of DeepSpeed that keys of clipmill decide."""
DEEPSPEED_KEYS = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_optimization",
)
"""Keys of DeepSpeed that have an effect here; it ignores those that it does not know."""


class TrainingConfig(Section):
    """Keys that both training stages have."""

    steps: Annotated[PositiveInt, FREE] = 100_000
    """Steps of the whole training. Raise it to go on with a finished one."""
    global_batch: PositiveInt = 32
    """Clips of a step, over all ranks and micro-steps."""
    micro_batch: Annotated[PositiveInt | None, FREE] = None
    """Clips that a rank takes through the model at once; None takes its whole share of the global batch. Another number
    draws other dropout. The tokenizer refuses a number that would change its batch statistics."""
    lr: Annotated[float, Field(gt=0), FREE] = 3e-4
    """Peak learning rate of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0), FREE] = 0
    """Steps in which the learning rate rises linearly to ``lr``."""
    schedule: Annotated[Literal["cosine", "constant"], FREE] = "cosine"
    """Learning rate after the warmup. ``cosine``: falls to ``min_lr_share`` of ``lr`` at the last step."""
    min_lr_share: Annotated[float, Field(ge=0, le=1), FREE] = 0.0
    """The cosine ends at this share of ``lr``."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of AdamW's moving averages of the gradient and of its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW, of matrices and kernels; norms, biases, gains and positions do not decay."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    weights_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, such as 0.999; the average is validated and exported. None keeps no
    average."""
    bad_steps: Annotated[Literal["stop", "skip"], FREE] = "stop"
    """A step whose gradients are not finite, or whose norm is a spike, stops the run, or is skipped and counted."""
    spike_factor: Annotated[float | None, Field(gt=1), FREE] = None
    """A gradient norm above this multiple of the mean of the last 50 steps (once there are 20) is a spike; None
    disables the check. Needs ZeRO stage 0, 1 or 2 without offload."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], FREE] = 1
    """What DeepSpeed ZeRO shards over the ranks. 0: nothing. 1: optimizer states. 2: gradients too. 3: weights too."""
    offload: Annotated[bool, FREE] = False
    """Keep the optimizer's states in CPU memory and step there; needs ZeRO stage 1, 2 or 3."""
    compile: Annotated[bool, FREE] = False
    """Compile the blocks of a prior, or encoder and decoder (torch.compile); needs ZeRO stage 0, 1 or 2."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Compute dtype; weights, gradients and reductions stay float32. ``tf32``: float32 whose products a GPU computes
    with 10 bits of mantissa; on a CPU the same as ``float32``."""
    shuffle_window: PositiveInt = 4096
    """Consecutive samples of a stream that are permuted together (see ``clipmill/shards/order.py``)."""
    loader_workers: Annotated[int, Field(ge=0), FREE] = 1
    """Processes of each rank that load batches; 0 loads them in the training process."""
    cache_bytes: Annotated[PositiveInt, FREE] = 64 * 2**30
    """Local disk that a node may fill with downloaded shards."""
    log_every: Annotated[PositiveInt, FREE] = 10
    """Steps between two lines of metrics."""
    val_every: Annotated[PositiveInt, FREE] = 1000
    """Steps between two validations."""
    val_clips: Annotated[PositiveInt, FREE] = 256
    """Clips of the split ``val`` that a periodic validation reads."""
    checkpoint_every: Annotated[PositiveInt, FREE] = 1000
    """Steps between two checkpoints. A kill costs at most the steps since the last one."""
    keep_last: Annotated[PositiveInt, FREE] = 2
    """Number of the newest checkpoints that are kept."""
    keep_every: Annotated[PositiveInt | None, FREE] = None
    """Also keep the checkpoints at multiples of this number of steps."""
    resume: Annotated[str, FREE, Place(lambda start: start not in ("auto", "never"))] = "auto"
    """``auto``: from this folder's newest checkpoint, if it has one. ``never``: refuse a folder that has one, or an
    export. A URL: start from the newest checkpoint of that training folder, which must have one."""
    init_from: Annotated[str | None, FREE, PLACE] = None
    """Start from the weights of an export: URL of a training folder or of one export. The model may differ from its:
    weights of the same name and size are taken, all others are named in the log and the summary. A training that has a
    checkpoint goes on from there. None starts from random weights."""
    accept_new_dataset: Annotated[bool, FREE] = False
    """Resume over other clips or tokens than those of the checkpoint, from the start of an epoch (`DATASET_KEYS`)."""
    hang_seconds: Annotated[float, Field(gt=0), FREE] = 900.0
    """A rank that waits for its peers longer than this names the one that hangs and ends itself."""
    peak_tflops: Annotated[float | None, Field(gt=0), FREE] = None
    """Dense peak of one GPU in TFLOP/s, in ``precision``, for MFU; None looks the GPU up by its name."""
    wandb_project: Annotated[str | None, FREE] = None
    """Also record to this project of Weights & Biases; needs the package ``wandb``."""
    deepspeed: Annotated[dict[str, Any], FREE] = Field(default_factory=dict)
    """Expert overrides of the generated DeepSpeed config (`DEEPSPEED_KEYS`); keys that clipmill sets itself are
    refused."""

    def rows_and_accumulation(self, world_size: int) -> tuple[int, int]:
        """Clips of a rank's micro-batch, and micro-batches of a step; rows beyond the rank's share are padding."""
        share = math.ceil(self.global_batch / world_size)
        accumulation = math.ceil(share / (self.micro_batch or share))
        return math.ceil(share / accumulation), accumulation

    @field_validator("deepspeed")
    @classmethod
    def _has_an_effect(cls, deepspeed: dict[str, Any]) -> dict[str, Any]:
        zero = deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed: zero_optimization {zero!r} must be a section of keys")
        for key in (*deepspeed, *(f"zero_optimization.{key}" for key in zero)):
            if ours := DEEPSPEED_TWINS.get(key):
                raise ValueError(f"deepspeed: clipmill sets {key} from {ours}; set {ours} instead")
            if key.partition(".")[0] not in DEEPSPEED_KEYS:
                known = ", ".join(DEEPSPEED_KEYS)
                raise ValueError(f"deepspeed: {key} would have no effect; keys that have one: {known}")
        return deepspeed

    @model_validator(mode="after")
    def _one_start(self) -> TrainingConfig:
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError("init_from and a URL in resume are two starts; remove one")
        return self

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> TrainingConfig:
        if self.micro_batch is not None and self.micro_batch > self.global_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} exceeds global_batch {self.global_batch}; lower it, or set it to null"
            )
        return self

    @model_validator(mode="after")
    def _stage_fits(self) -> TrainingConfig:
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3: without ZeRO the optimizer steps where the model is")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2: stage 3 gathers weights inside the model")
        if self.spike_factor is not None and (self.zero_stage == 3 or self.offload):
            raise ValueError(
                "spike_factor needs zero_stage 0, 1 or 2 without offload: otherwise DeepSpeed decides on a step"
            )
        return self


def refused_changes(recorded: dict[str, Any], wanted: dict[str, Any], accept_new_dataset: bool) -> list[str]:
    """Names the keys of a training's identity that must not differ but do, as `changed_keys` does."""
    ignored = DATASET_KEYS if accept_new_dataset else frozenset()
    changes = changed_keys(
        {key: value for key, value in recorded.items() if key not in ignored},
        {key: value for key, value in wanted.items() if key not in ignored},
    )
    if any(change.split(" ")[0] in DATASET_KEYS for change in changes):
        changes[-1] += " (--accept-new-dataset resumes over another data set)"
    return changes


class VQVAETrainingConfig(TrainingConfig):
    """Training of the tokenizer, with the paper's learning rate."""

    lr: Annotated[float, Field(gt=0), FREE] = 7e-4
    """Peak learning rate of AdamW."""
    hflip: Annotated[bool, FREE] = False
    """Mirror half of the clips, at random. Leave it off where left and right differ in meaning."""
    random_crop: Annotated[Resolution | None, FREE] = None
    """Train on a random crop of each clip: ``48`` for 48 x 48 pixels, ``[36, 64]`` for height 36 and width 64.
    Validation and all other stages see whole clips. None trains on whole clips, too."""


class VQVAEConfig(Section):
    """Stage ``train-vqvae``."""

    model: VQVAEModelConfig = VQVAEModelConfig()
    sharpness: SharpnessConfig = SharpnessConfig()
    training: VQVAETrainingConfig = VQVAETrainingConfig()

    @model_validator(mode="after")
    def _discriminator_is_whole(self) -> VQVAEConfig:
        if self.sharpness.adversarial_cost and self.training.zero_stage == 3:
            raise ValueError(
                "sharpness.adversarial_cost needs training.zero_stage 0, 1 or 2: stage 3 cannot take the "
                "discriminator's gradient within a step"
            )
        return self

    @model_validator(mode="after")
    def _crop_divides(self) -> VQVAEConfig:
        crop, factors = self.training.random_crop, self.model.downsample[1:]
        if crop is not None and any(side % factor for side, factor in zip(frame_size(crop), factors, strict=True)):
            raise ValueError(
                f"training.random_crop {crop} must divide by the height and width {factors} of model.downsample"
            )
        return self


class PriorTrainingConfig(TrainingConfig):
    """Training of the prior, which shows samples meanwhile."""

    sample_every: Annotated[PositiveInt | None, FREE] = 2000
    """Steps between two previews: a few samples of every class, drawn as ``sample`` says from the same noise each time,
    in ``prior/previews``, TensorBoard, Weights & Biases and the report. The last step has one too. None draws none."""


class PriorConfig(Section):
    """Stage ``train-prior``."""

    model: PriorModelConfig = PriorModelConfig()
    training: PriorTrainingConfig = PriorTrainingConfig()
