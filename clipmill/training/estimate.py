"""Estimates a training by arithmetic and a dry run: GPU memory, time, cost, and bytes on disk.

The model is built and run on fake tensors (shapes without memory), so any machine can estimate a model of any size.
Parameters stay float32 in training, whatever the compute dtype (see `clipmill.training.zero.engine`).

P: parameters   W: GPUs   B: clips of a micro-batch   L: tokens of a clip
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from clipmill.config import PriorModelConfig, RunConfig, TrainingConfig, frame_size
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, codes_shape, to_input
from clipmill.shards.format import code_dtype
from clipmill.training.kernels import AsOnCuda, saved_bytes
from clipmill.training.throughput import prior_flops_per_token, vqvae_flops_per_clip
from clipmill.training.zero.engine import bucket_elements

__all__ = ["Estimate", "Memory", "activation_bytes", "build_prior", "estimate", "model_state_bytes"]

FLOAT = 4
LIVE_ELEMENTS = 1_000_000_000
"""Parameters that stage 3 gathers at once: DeepSpeed's default."""
TAR_BLOCK = 512
COMPILED_SHARE = 0.8
"""Activations of compiled blocks relative to uncompiled ones. On an H100 in bfloat16: 0.79 (`100m`) and 0.80 (`1b`)."""
USABLE_SHARE = 0.94
"""Usable share of a GPU's memory; the CUDA context and gaps between tensors take the rest."""
SECONDS_PER_DAY = 86_400

Stage = Literal["vqvae", "prior"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at one ZeRO stage."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Temporary buffers of DeepSpeed."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Estimate:
    """Result of `estimate`; in bytes, unless the name says otherwise."""

    num_parameters: int
    tokens_per_clip: int
    rows: int
    accumulation: int
    states: tuple[Memory, ...]
    """By ZeRO stage, 0 to 3."""
    activations: int
    """Activations of one micro-batch, with the ``checkpointed_share`` of the config."""
    checkpointed_activations: int
    """The same if every block is recomputed (``prior.model.checkpointed_share=1``); a tokenizer cannot recompute."""
    largest_rows: tuple[int, ...]
    """Clips of the largest micro-batch that fits the GPU, by ZeRO stage; 0 if none does."""
    flops_per_token: float
    """Forward and backward, without recomputation."""
    tokens_per_day: float
    hours: float
    """Of all steps."""
    token_bytes_per_clip: int
    checkpoint_bytes: int
    upload_seconds: float


def estimate(
    config: RunConfig,
    num_gpus: int,
    *,
    mfu: float,
    peak_tflops: float,
    gpus_per_node: int,
    upload_mb_per_second: float,
    memory_gib: float = 80.0,
    stage: Stage = "prior",
) -> Estimate:
    """Estimates the training of a prior or a tokenizer.

    Args:
        config: of the run, which need not exist yet.
        num_gpus: W.
        mfu: assumed share of the peak.
        peak_tflops: of one GPU, dense, in the precision of the training.
        gpus_per_node: GPUs of a node; each node uploads its part of a checkpoint.
        upload_mb_per_second: of one node, 10^6 bytes.
        memory_gib: of one GPU.
        stage: which training.

    Raises:
        UserError: the clips do not divide by the tokenizer's downsampling.
    """
    clip = config.data.clip
    tokens = math.prod(codes_shape(config.vqvae.model, clip.num_frames, clip.size))
    training = _training(config, stage)
    rows, accumulation = training.rows_and_accumulation(num_gpus)
    num_parameters, largest_block, flops = _sizes(config, stage)
    states = tuple(
        model_state_bytes(num_parameters, zero_stage, num_gpus, largest_block, accumulation) for zero_stage in range(4)
    )
    usable = memory_gib * 2**30 * USABLE_SHARE
    kept = _kept_of(config, stage)
    checkpoint_bytes = _checkpoint_bytes(num_parameters, training.zero_stage)
    num_nodes = math.ceil(num_gpus / gpus_per_node)
    tokens_per_day = num_gpus * mfu * peak_tflops * 1e12 / flops * SECONDS_PER_DAY
    return Estimate(
        num_parameters=num_parameters,
        tokens_per_clip=tokens,
        rows=rows,
        accumulation=accumulation,
        states=states,
        activations=kept(rows),
        checkpointed_activations=activation_bytes(config, rows, 1.0, stage),
        largest_rows=tuple(_largest_rows(kept, usable - memory.total, training.global_batch) for memory in states),
        flops_per_token=flops,
        tokens_per_day=tokens_per_day,
        hours=training.steps * training.global_batch * tokens / tokens_per_day * 24,
        token_bytes_per_clip=_token_bytes(tokens, config.vqvae.model.num_codes),
        checkpoint_bytes=checkpoint_bytes,
        upload_seconds=checkpoint_bytes / num_nodes / (upload_mb_per_second * 1e6),
    )


def _sizes(config: RunConfig, stage: Stage) -> tuple[int, int, float]:
    """Parameters of the model, parameters of its largest block, FLOPs per token."""
    clip = config.data.clip
    shape = codes_shape(config.vqvae.model, clip.num_frames, clip.size)
    with FakeTensorMode():
        if stage == "prior":
            prior = build_prior(config, config.prior.model, shape)
            return _num_parameters(prior), max(map(_num_parameters, prior.blocks)), prior_flops_per_token(prior)
        vqvae = VQVAE(config.vqvae.model, pixel_variance=1.0)
        flops = vqvae_flops_per_clip(config.vqvae.model, clip.num_frames, clip.size) / math.prod(shape)
        return _num_parameters(vqvae), max(map(_num_parameters, vqvae.blocks), default=0), flops


def _training(config: RunConfig, stage: Stage) -> TrainingConfig:
    return config.prior.training if stage == "prior" else config.vqvae.training


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kept_of(config: RunConfig, stage: Stage) -> Callable[[int], int]:
    """A function from the clips of a micro-batch to its activation bytes, with the recomputation of the config."""
    share = config.prior.model.checkpointed_share if stage == "prior" else 0.0
    return lambda rows: activation_bytes(config, rows, share, stage)


def _largest_rows(kept: Callable[[int], int], room: float, most: int) -> int:
    """The largest micro-batch, of at most ``most`` clips, whose activations fit."""
    fitting, too_many = 0, most + 1
    while too_many - fitting > 1:
        rows = (fitting + too_many) // 2
        fitting, too_many = (rows, too_many) if kept(rows) <= room else (fitting, rows)
    return fitting


def model_state_bytes(num_parameters: int, stage: int, num_gpus: int, largest_block: int, accumulation: int) -> Memory:
    """Weights, gradients and AdamW's states on one GPU (ZeRO, arXiv 1910.02054), all in float32.

    - Weights: DeepSpeed's stages 1 to 3 keep a second copy of the weights in the optimizer's partition.
    - Buckets: gradients are collected in a bucket before they are sent. Stages 1 and 2 have two buckets, because the
      backward pass fills one while the other is sent. Stage 0 has a bucket only with several GPUs.
    - Gradients: stages 1 and 2 keep a part of the gradients. Stage 1 keeps all of them while it accumulates
      micro-batches.

    Args:
        num_parameters: P.
        stage: ZeRO stage, 0 to 3.
        num_gpus: W.
        largest_block: parameters of the largest block, which stage 3 gathers whole.
        accumulation: micro-batches per step.
    """
    whole = FLOAT * num_parameters
    part = FLOAT * math.ceil(num_parameters / num_gpus)
    bucket = FLOAT * bucket_elements(num_parameters, overlaps=False)
    if stage == 0:
        return Memory(weights=whole, gradients=whole, optimizer=2 * whole, buffers=bucket if num_gpus > 1 else 0)
    if stage < 3:
        gradients = whole if stage == 1 and accumulation > 1 else part
        if num_gpus > 1:
            bucket = 2 * FLOAT * bucket_elements(num_parameters, overlaps=True)
        return Memory(weights=whole, gradients=gradients, optimizer=3 * part, buffers=bucket)
    gathered = FLOAT * max(largest_block, min(num_parameters, LIVE_ELEMENTS))
    return Memory(weights=part, gradients=part, optimizer=3 * part, buffers=bucket + gathered)


def activation_bytes(config: RunConfig, rows: int, checkpointed_share: float, stage: Stage = "prior") -> int:
    """Bytes of activations that a GPU keeps between forward and backward pass of one micro-batch.

    All blocks of a prior are alike. A run with one block and a run with two show what a block keeps, and what the rest
    of the model keeps.

    Args:
        config: of the run.
        rows: B.
        checkpointed_share: share of the prior's blocks whose activations are recomputed.
        stage: which training.
    """
    if stage == "vqvae":
        return _kept_of_vqvae(config, rows)
    model, clip = config.prior.model, config.data.clip
    shape = codes_shape(config.vqvae.model, clip.num_frames, clip.size)
    one, two = (_kept_of_prior(config, model.model_copy(update={"num_layers": n}), rows) for n in (1, 2))
    block, rest = two - one, 2 * one - two
    if config.prior.training.compile:
        block = round(block * COMPILED_SHARE)
    again = round(checkpointed_share * model.num_layers)
    is_narrow = _is_bfloat16(config.prior.training) and model.style == "modern"  # bfloat16 between blocks
    block_input = (2 if is_narrow else FLOAT) * rows * math.prod(shape) * model.hidden_dim
    # While one block is recomputed, all its activations are in memory, and so are the inputs of the other blocks.
    return rest + block * (model.num_layers - again) + block_input * again + (block if again else 0)


def _is_bfloat16(training: TrainingConfig) -> bool:
    return training.precision == "bfloat16"


def _kept_of_prior(config: RunConfig, model: PriorModelConfig, rows: int) -> int:
    """Activation bytes of a prior of this size, with all its blocks."""
    clip = config.data.clip
    shape = codes_shape(config.vqvae.model, clip.num_frames, clip.size)
    with FakeTensorMode():
        prior = build_prior(config, model.model_copy(update={"checkpointed_share": 0.0}), shape).train()
        codes = torch.zeros(rows, *shape, dtype=torch.int64)
        label = torch.zeros(rows, dtype=torch.int64) if model.class_conditional else None
        condition_shape = _condition_shape(config)
        condition = None
        if condition_shape is not None:
            dtype = torch.uint8 if model.condition == "frames" else torch.float32
            condition = torch.zeros(rows, *condition_shape, dtype=dtype)
        return _kept(prior, lambda: prior.loss(codes, label, condition).sum(), config.prior.training)


def _kept_of_vqvae(config: RunConfig, rows: int) -> int:
    """Activation bytes of a tokenizer. Skips k-means, which cannot run on fake tensors: initial codes do not matter."""
    clip = config.data.clip
    crop = config.vqvae.training.random_crop
    size = clip.size if crop is None else frame_size(crop)
    with FakeTensorMode():
        model = VQVAE(config.vqvae.model.model_copy(update={"codebook_start": "rows"}), pixel_variance=1.0).train()
        video = torch.zeros(rows, clip.num_frames, *size, 3, dtype=torch.uint8)
        return _kept(model, lambda: model(to_input(video)).loss, config.vqvae.training)


def _kept(model: torch.nn.Module, run: Callable[[], Tensor], training: TrainingConfig) -> int:
    with AsOnCuda(), torch.autocast("cpu", torch.bfloat16, enabled=_is_bfloat16(training)):
        return saved_bytes(run, [*model.parameters(), *model.buffers()])


def build_prior(config: RunConfig, model: PriorModelConfig, shape: tuple[int, ...]) -> Prior:
    """A prior as large as the one that will be trained, as far as its size is known without data."""
    tokenizer = config.vqvae.model
    codebook = torch.zeros(
        tokenizer.num_codes * tokenizer.num_codebooks, tokenizer.latent_dim // tokenizer.num_codebooks
    )
    num_classes = 100 if model.class_conditional else 0
    return Prior(model, shape, tokenizer.num_codes, codebook, num_classes, _condition_shape(config))


def _condition_shape(config: RunConfig) -> tuple[int, ...] | None:
    """Shape of a condition: from the config, or a common one (8 numbers per action, CLIP's 77 x 768 for a text)."""
    clip = config.data.clip
    shapes = {
        "frames": (max(1, config.tokenize.condition_frames), *clip.size, 3),
        "actions": (clip.num_frames, 8),
        "text": (77, 768),
    }
    condition = config.prior.model.condition
    return None if condition is None else shapes[condition]


def _token_bytes(tokens_per_clip: int, num_codes: int) -> int:
    """Bytes of a clip in a token shard: two members of a tar, each with a header and in whole blocks."""
    codes = 128 + tokens_per_clip * code_dtype(num_codes).itemsize  # .npy header, codes
    about = TAR_BLOCK  # of json, rounded up
    return 2 * TAR_BLOCK + math.ceil(codes / TAR_BLOCK) * TAR_BLOCK + about


def _checkpoint_bytes(num_parameters: int, zero_stage: int) -> int:
    """Weights (at stage 3 they are the optimizer's copy), and the optimizer's states with its copy of the weights."""
    copies = {0: 3, 1: 4, 2: 4, 3: 3}
    return FLOAT * num_parameters * copies[zero_stage]
