"""What training a prior will take, by arithmetic and a dry run: memory of a GPU, tokens a day, bytes on disk.

The model is built and run on fake tensors (shapes without memory), so a prior of any size is estimated on any machine.
Parameters stay float32 in training, whatever the compute dtype (see `clipmill.training.zero.engine`).

P: parameters   W: GPUs   B: clips of a micro-batch   L: tokens of a clip
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from clipmill.config import PriorModelConfig, RunConfig
from clipmill.models.prior import Prior
from clipmill.models.vqvae import codes_shape
from clipmill.shards.format import code_dtype
from clipmill.training.throughput import prior_flops_per_token
from clipmill.training.zero.engine import BUCKET_ELEMENTS

__all__ = ["Estimate", "Memory", "activation_bytes", "estimate", "model_state_bytes", "saved_bytes"]

FLOAT = 4
LIVE_ELEMENTS = 1_000_000_000
"""Parameters that stage 3 gathers at once: DeepSpeed's default."""
TAR_BLOCK = 512
COMPILED_SHARE = 0.8
"""Activations of compiled blocks over those of others: 0.79 (preset 100m) and 0.80 (1b) in bfloat16 on an H100."""
SECONDS_PER_DAY = 86_400


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
    """Activations of one micro-batch, all of them kept."""
    checkpointed_activations: int
    """The same with those of every block recomputed (``prior.model.checkpointed_share=1``)."""
    flops_per_token: float
    """Forward and backward, without recomputation."""
    tokens_per_day: float
    token_bytes_per_clip: int
    checkpoint_bytes: int
    upload_seconds: float


def estimate(
    config: RunConfig, num_gpus: int, *, mfu: float, peak_tflops: float, gpus_per_node: int, upload_mb_per_second: float
) -> Estimate:
    """Estimates stage ``train-prior``.

    Args:
        config: of the run; nothing of it needs to exist.
        num_gpus: W.
        mfu: share of the peak that is reached.
        peak_tflops: of one GPU, dense, in the precision of the training.
        gpus_per_node: each node uploads its part of a checkpoint.
        upload_mb_per_second: of one node, 10^6 bytes.

    Raises:
        UserError: the clips do not divide by the tokenizer's downsampling.
    """
    clip, model = config.data.clip, config.prior.model
    shape = codes_shape(config.vqvae.model, clip.num_frames, clip.size)
    tokens = math.prod(shape)
    rows, accumulation = config.prior.training.rows_and_accumulation(num_gpus)
    with FakeTensorMode():
        prior = build_prior(config, model, shape)
        num_parameters = sum(parameter.numel() for parameter in prior.parameters())
        largest_block = max(sum(parameter.numel() for parameter in block.parameters()) for block in prior.blocks)
        flops = prior_flops_per_token(prior)
    states = tuple(
        model_state_bytes(num_parameters, stage, num_gpus, largest_block, accumulation) for stage in range(4)
    )
    checkpoint_bytes = _checkpoint_bytes(num_parameters, config.prior.training.zero_stage)
    num_nodes = math.ceil(num_gpus / gpus_per_node)
    return Estimate(
        num_parameters=num_parameters,
        tokens_per_clip=tokens,
        rows=rows,
        accumulation=accumulation,
        states=states,
        activations=activation_bytes(config, rows, checkpointed_share=0.0),
        checkpointed_activations=activation_bytes(config, rows, checkpointed_share=1.0),
        flops_per_token=flops,
        tokens_per_day=num_gpus * mfu * peak_tflops * 1e12 / flops * SECONDS_PER_DAY,
        token_bytes_per_clip=_token_bytes(tokens, config.vqvae.model.num_codes),
        checkpoint_bytes=checkpoint_bytes,
        upload_seconds=checkpoint_bytes / num_nodes / (upload_mb_per_second * 1e6),
    )


def model_state_bytes(num_parameters: int, stage: int, num_gpus: int, largest_block: int, accumulation: int) -> Memory:
    """Weights, gradients and AdamW's states on one GPU (ZeRO, arXiv 1910.02054, with all of it in float32).

    DeepSpeed's stages 1 to 3 keep a second copy of the weights in the optimizer's partition, and collect gradients in a
    bucket before they send them. Stage 1 keeps a part of the gradients, as stage 2 does; it keeps them whole only while
    it accumulates micro-batches.

    Args:
        num_parameters: P.
        stage: of ZeRO, 0 to 3.
        num_gpus: W.
        largest_block: parameters of the largest block, which stage 3 gathers whole.
        accumulation: micro-batches a step.
    """
    whole = FLOAT * num_parameters
    part = FLOAT * math.ceil(num_parameters / num_gpus)
    if stage == 0:
        return Memory(weights=whole, gradients=whole, optimizer=2 * whole, buffers=0)
    bucket = FLOAT * min(num_parameters, BUCKET_ELEMENTS)
    if stage < 3:
        gradients = whole if stage == 1 and accumulation > 1 else part
        return Memory(weights=whole, gradients=gradients, optimizer=3 * part, buffers=bucket)
    gathered = FLOAT * max(largest_block, min(num_parameters, LIVE_ELEMENTS))
    return Memory(weights=part, gradients=part, optimizer=3 * part, buffers=bucket + gathered)


def activation_bytes(config: RunConfig, rows: int, checkpointed_share: float) -> int:
    """Bytes kept of one micro-batch between its forward and its backward pass.

    All blocks are alike: two runs, of one block and of two, show what a block keeps and what the rest keeps.
    """
    model, clip = config.prior.model, config.data.clip
    shape = codes_shape(config.vqvae.model, clip.num_frames, clip.size)
    bfloat16 = config.prior.training.precision == "bfloat16"
    with FakeTensorMode():
        one, two = (_kept(config, model.model_copy(update={"num_layers": n}), shape, rows, bfloat16) for n in (1, 2))
    block, rest = two - one, 2 * one - two
    if config.prior.training.compile:
        block = round(block * COMPILED_SHARE)
    again = round(checkpointed_share * model.num_layers)
    is_narrow = bfloat16 and model.style == "modern"  # activations between blocks are bfloat16
    block_input = (2 if is_narrow else FLOAT) * rows * math.prod(shape) * model.hidden_dim
    # While one block is recomputed, all of its activations are there beside the inputs of the others.
    return rest + block * (model.num_layers - again) + block_input * again + (block if again else 0)


def saved_bytes(prior: Prior, codes: Tensor, label: Tensor | None, condition: Tensor | None, bfloat16: bool) -> int:
    """Bytes that autograd holds after the forward pass of a micro-batch, parameters and buffers not counted."""
    own = {tensor.untyped_storage()._cdata for tensor in (*prior.parameters(), *prior.buffers())}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = tensor  # alive, so that no other storage takes its address
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast(codes.device.type, torch.bfloat16, enabled=bfloat16):
        prior.loss(codes, label, condition).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _kept(config: RunConfig, model: PriorModelConfig, shape: tuple[int, ...], rows: int, bfloat16: bool) -> int:
    """`saved_bytes` of a prior of this size on fake tensors."""
    prior = build_prior(config, model.model_copy(update={"checkpointed_share": 0.0}), shape).train()
    codes = torch.zeros(rows, *shape, dtype=torch.int64)
    label = torch.zeros(rows, dtype=torch.int64) if model.class_conditional else None
    condition_shape = _condition_shape(config)
    condition = None
    if condition_shape is not None:
        dtype = torch.uint8 if model.condition == "frames" else torch.float32
        condition = torch.zeros(rows, *condition_shape, dtype=dtype)
    return saved_bytes(prior, codes, label, condition, bfloat16)


def build_prior(config: RunConfig, model: PriorModelConfig, shape: tuple[int, ...]) -> Prior:
    """A prior as large as the one to be trained, as far as its size is known without data."""
    tokenizer = config.vqvae.model
    codebook = torch.zeros(
        tokenizer.num_codes * tokenizer.num_codebooks, tokenizer.latent_dim // tokenizer.num_codebooks
    )
    num_classes = 100 if model.class_conditional else 0
    return Prior(model, shape, tokenizer.num_codes, codebook, num_classes, _condition_shape(config))


def _condition_shape(config: RunConfig) -> tuple[int, ...] | None:
    """Shape of a condition: from the config, or a common one (8 numbers an action, 77 x 768 of CLIP for a text)."""
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
