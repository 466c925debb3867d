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
"""Keys of a training stage's identity that hold fingerprints of data sets."""


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
"""DeepSpeed keys that clipmill sets, and the clipmill keys that it sets them from."""
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
"""DeepSpeed keys that users may override. DeepSpeed ignores unknown keys, so clipmill refuses all others."""


class TrainingConfig(Section):
    """Keys that both training stages share."""

    steps: Annotated[PositiveInt, FREE] = 100_000
    """Optimizer steps of the whole training. Raise it to continue a finished training."""
    global_batch: PositiveInt = 32
    """Clips in a step, over all ranks and micro-steps."""
    micro_batch: Annotated[PositiveInt | None, FREE] = None
    """Clips in one forward and backward pass of a rank. None uses the rank's whole share of ``global_batch``; a smaller
    number accumulates gradients. Changing it changes the dropout masks. The tokenizer refuses a change that would alter
    its batch statistics."""
    lr: Annotated[float, Field(gt=0), FREE] = 3e-4
    """Peak learning rate of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0), FREE] = 0
    """Steps over which the learning rate rises linearly from 0 to ``lr``. 0 starts at ``lr``."""
    schedule: Annotated[Literal["cosine", "constant"], FREE] = "cosine"
    """Learning rate after the warmup. ``cosine``: it falls to ``min_lr_share`` of ``lr`` at the last step.
    ``constant``: it stays at ``lr``."""
    min_lr_share: Annotated[float, Field(ge=0, le=1), FREE] = 0.0
    """Learning rate at the end of the cosine schedule, as a share of ``lr``."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decays of the moving averages of the gradient and of its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay of matrices and convolution kernels; norms, biases, gains and positions do not decay. 0
    disables it."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    weights_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999. Validation and exports then use the
    average. None keeps no average."""
    bad_steps: Annotated[Literal["stop", "skip"], FREE] = "stop"
    """What to do at a step whose gradients are not finite or whose gradient norm is a spike (``spike_factor``).
    ``stop``: end the run with an error. ``skip``: skip the step and count it."""
    spike_factor: Annotated[float | None, Field(gt=1), FREE] = None
    """A gradient norm above this multiple of the mean of the last 50 steps (once there are 20) is a spike; None
    disables the check. Needs ZeRO stage 0, 1 or 2 without offload."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], FREE] = 1
    """What DeepSpeed ZeRO shards over the ranks. 0: nothing. 1: optimizer states. 2: also gradients. 3: also
    weights."""
    offload: Annotated[bool, FREE] = False
    """Keep the optimizer states in CPU memory and run the optimizer step there; needs ZeRO stage 1, 2 or 3."""
    compile: Annotated[bool, FREE] = False
    """Compile the prior's blocks, or the tokenizer's encoder and decoder, with torch.compile; needs ZeRO stage 0, 1 or
    2."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Compute dtype; weights, gradients and reductions stay float32. ``tf32``: float32, but a GPU rounds the factors of
    matrix products to 10 bits of mantissa; on a CPU the same as ``float32``."""
    shuffle_window: PositiveInt = 4096
    """Size of the shuffle window: this number of consecutive samples of a stream is permuted together (see
    ``clipmill/shards/order.py``)."""
    loader_workers: Annotated[int, Field(ge=0), FREE] = 1
    """Processes that load batches, for each rank; 0 loads them in the training process."""
    cache_bytes: Annotated[PositiveInt, FREE] = 64 * 2**30
    """Bytes of local disk that a node may use for downloaded shards."""
    log_every: Annotated[PositiveInt, FREE] = 10
    """Steps between two records of metrics."""
    val_every: Annotated[PositiveInt, FREE] = 1000
    """Steps between two validations."""
    val_clips: Annotated[PositiveInt, FREE] = 256
    """Clips of the split ``val`` in each validation during training."""
    checkpoint_every: Annotated[PositiveInt, FREE] = 1000
    """Steps between two checkpoints. A killed run loses at most the steps since its last checkpoint."""
    keep_last: Annotated[PositiveInt, FREE] = 2
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[PositiveInt | None, FREE] = None
    """Also keep the checkpoints at multiples of this number of steps. None keeps only the newest."""
    resume: Annotated[str, FREE, Place(lambda start: start not in ("auto", "never"))] = "auto"
    """Where a training starts. ``auto``: at the newest checkpoint of its own folder, or at step 0 without one.
    ``never``: at step 0; a folder with a checkpoint or an export is refused. A URL: at the newest checkpoint of that
    training folder, which must exist."""
    init_from: Annotated[str | None, FREE, PLACE] = None
    """URL of a training folder or of one export whose weights initialise the model. The models may differ: weights of
    the same name and shape are loaded; log and summary list the others, which start at random. Ignored once the
    training has a checkpoint of its own. None starts from random weights."""
    accept_new_dataset: Annotated[bool, FREE] = False
    """Allow resuming with a data set other than the checkpoint's (``DATASET_KEYS``); the order of samples then restarts
    at the start of an epoch. False refuses."""
    hang_seconds: Annotated[float, Field(gt=0), FREE] = 900.0
    """A rank that waits for its peers longer than this names the hanging rank and exits."""
    peak_tflops: Annotated[float | None, Field(gt=0), FREE] = None
    """Dense peak of one GPU in TFLOP/s at ``precision``, to compute MFU. None looks up the GPU by its name."""
    wandb_project: Annotated[str | None, FREE] = None
    """Also log metrics to this project of Weights & Biases; needs the package ``wandb``. None disables it."""
    deepspeed: Annotated[dict[str, Any], FREE] = Field(default_factory=dict)
    """Expert overrides of the generated DeepSpeed config (``DEEPSPEED_KEYS``); keys that clipmill sets itself are
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
            raise ValueError("init_from and a URL in resume exclude each other; remove one")
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
                "spike_factor needs zero_stage 0, 1 or 2 without offload; remove it: elsewhere DeepSpeed alone decides "
                "whether to skip a step"
            )
        return self


def refused_changes(recorded: dict[str, Any], wanted: dict[str, Any], accept_new_dataset: bool) -> list[str]:
    """Lists the keys of a training's identity that must not change but did, in the form of `changed_keys`."""
    ignored = DATASET_KEYS if accept_new_dataset else frozenset()
    changes = changed_keys(
        {key: value for key, value in recorded.items() if key not in ignored},
        {key: value for key, value in wanted.items() if key not in ignored},
    )
    if any(change.split(" ")[0] in DATASET_KEYS for change in changes):
        changes[-1] += " (--accept-new-dataset resumes over another data set)"
    return changes


class VQVAETrainingConfig(TrainingConfig):
    """Training of the tokenizer; the default learning rate is the paper's."""

    lr: Annotated[float, Field(gt=0), FREE] = 7e-4
    """Peak learning rate of AdamW."""
    hflip: Annotated[bool, FREE] = False
    """Mirror each clip horizontally with probability 1/2. Leave it off where left and right differ in meaning."""
    random_crop: Annotated[Resolution | None, FREE] = None
    """Train on a random crop of each clip: ``48`` for 48 x 48 pixels, ``[36, 64]`` for height 36 and width 64.
    Validation and all other stages use whole clips. None trains on whole clips."""


class VQVAEConfig(Section):
    """Stage ``train-vqvae``."""

    model: VQVAEModelConfig = VQVAEModelConfig()
    sharpness: SharpnessConfig = SharpnessConfig()
    training: VQVAETrainingConfig = VQVAETrainingConfig()

    @model_validator(mode="after")
    def _discriminator_is_whole(self) -> VQVAEConfig:
        if self.sharpness.adversarial_cost and self.training.zero_stage == 3:
            raise ValueError(
                "sharpness.adversarial_cost needs training.zero_stage 0, 1 or 2; lower it: stage 3 cannot compute the "
                "discriminator's gradient within a step"
            )
        return self

    @model_validator(mode="after")
    def _crop_divides(self) -> VQVAEConfig:
        crop, factors = self.training.random_crop, self.model.downsample[1:]
        if crop is not None and any(side % factor for side, factor in zip(frame_size(crop), factors, strict=True)):
            raise ValueError(
                f"training.random_crop {crop} must be a multiple of the height and width {factors} of model.downsample"
            )
        return self


class PriorTrainingConfig(TrainingConfig):
    """Training of the prior, which draws sample previews while it runs."""

    sample_every: Annotated[PositiveInt | None, FREE] = 2000
    """Steps between two previews; the last step has one too. A preview is a few samples of every class, drawn with the
    settings of ``sample`` and the same noise each time. It goes to ``prior/previews``, TensorBoard, Weights & Biases
    and the report. None draws no previews; neither does ZeRO stage 3."""


class PriorConfig(Section):
    """Stage ``train-prior``."""

    model: PriorModelConfig = PriorModelConfig()
    training: PriorTrainingConfig = PriorTrainingConfig()
