"""The prior: a transformer over the codes of a clip, one position after another.

Position p is predicted from the codes before it. There are two styles. VideoGPT's (arXiv 2104.10157, section 3.2, laid
out as in its published code) takes a code's codebook vector as input and learns positions for each axis. The modern one
learns its own embeddings of codes and rotates queries and keys by position.

B: batch   t, h, w: latent frames, height, width   M: codes of a latent, one of each codebook   K: codes of a codebook
L = t * h * w * M, raster order   C: hidden channels
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipmill.config import PriorModelConfig
from clipmill.errors import UserError
from clipmill.models.blocks import Block, norms_per_block
from clipmill.models.code_layers import CodeHead, CodeInput
from clipmill.models.conditioning import Condition, Conditioning
from clipmill.models.norms import Norm, Norms, layer_norm, rms_norm
from clipmill.models.positions import rotations
from clipmill.models.strided import StridedMask

__all__ = ["Prior"]

CHUNK_LOGITS = 2**26
"""Logits held at once by the loss (float32: 256 MiB)."""


class Prior(nn.Module):
    """An autoregressive distribution over the codes of a clip.

    Args:
        config: sizes, dropout, style and conditioning.
        latent_shape: (t, h, w) of the codes, or (t, h, w, M) with several codebooks.
        num_codes: K.
        codebook: the tokenizer's embeddings, float [M * K, D]; None in the modern style, which does not use them.
        num_classes: classes of the data; used if ``config.class_conditional``.
        condition_shape: shape of ``config.condition`` for one clip (see `Condition`); None without a condition.

    Attributes:
        null_label: the label that means no class; None if the prior has none.

    Raises:
        UserError: the config needs classes or a condition that the data does not have, or its attention does not fit
            the latents.
    """

    rotation: Tensor | None

    def __init__(
        self,
        config: PriorModelConfig,
        latent_shape: tuple[int, ...],
        num_codes: int,
        codebook: Tensor | None,
        num_classes: int = 0,
        condition_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if config.class_conditional and num_classes < 1:
            raise UserError(
                "prior.model.class_conditional needs labelled clips, and these have none; "
                "set data.source.label=parent_folder and shard again, or class_conditional=false"
            )
        if config.condition is not None and condition_shape is None:
            raise UserError(f"prior.model.condition={config.condition} needs clips with {config.condition}")
        self.config = config
        self.latent_shape = latent_shape
        self.num_codes = num_codes
        self.num_positions = math.prod(latent_shape)
        modern = config.style == "modern"
        self.input = CodeInput(config, latent_shape, num_codes, codebook)
        self.norms_per_block = norms_per_block(config)
        num_norms = self.norms_per_block * config.num_layers + 1
        num_classes *= config.class_conditional
        self.null_label = num_classes if config.label_dropout else None
        self.norms = Norms(
            num_norms,
            config.hidden_dim,
            num_classes,
            null_class=self.null_label is not None,
            with_bias=not modern or config.condition_by == "norm",
        )
        self.normalise = rms_norm if modern else layer_norm
        self.condition = None
        if condition_shape is not None and config.condition is not None:
            self.condition = Condition(config, condition_shape, latent_shape[0], num_norms)
        memory_dim = None if self.condition is None else self.condition.memory_dim
        self.blocks = nn.ModuleList(Block(config, memory_dim) for _ in range(config.num_layers))
        self.head = CodeHead(config.hidden_dim, num_codes, self.input.num_codebooks)
        rotation = rotations(latent_shape, config.head_dim, config.rope_base) if modern else None  # [2, L, D / 2]
        self.register_buffer("rotation", rotation, persistent=False)
        self.mask = StridedMask(latent_shape) if config.attention == "strided" else None

    def forward(self, codes: Tensor, label: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Logits of each code given those before it.

        Args:
            codes: int64 [B, t, h, w] or [B, t, h, w, M].
            label: class of each clip, int64 [B]; None for an unconditional prior.
            condition: conditioning beyond the class (see `Condition`); None for a prior without a condition.

        Returns:
            Float [B, L, K].
        """
        return self.head(self._hidden(codes, label, condition).flatten(0, 1)).unflatten(0, (len(codes), -1))

    @property
    def guidable(self) -> bool:
        """Whether training hides the class or the condition at random, which guidance needs."""
        return self.null_label is not None or self.config.condition_dropout > 0

    def loss(self, codes: Tensor, label: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each clip's codes in nats per code, float32 [B]; arguments as for ``forward``.

        In training, classes and conditions are hidden with the probabilities ``label_dropout`` and
        ``condition_dropout``.
        """
        hide = None
        if self.training and self.guidable:
            # One random number for both, so that the prior without class and condition, which guidance needs, is
            # trained too.
            chance = torch.rand(len(codes), device=codes.device)
            if label is not None and self.null_label is not None:
                label = label.masked_fill(chance < self.config.label_dropout, self.null_label)
            hide = chance < self.config.condition_dropout if self.config.condition_dropout else None
        hidden = self._hidden(codes, label, condition, hide).flatten(0, 1)
        targets = codes.flatten()
        num_codebooks = self.input.num_codebooks
        rows_per_chunk = max(1, CHUNK_LOGITS // self.num_codes // num_codebooks) * num_codebooks
        if len(targets) <= rows_per_chunk:
            losses = self._cross_entropy(hidden, targets)
        else:
            # Logits far larger than the model's activations: one chunk at a time, recomputed for the gradient.
            chunks = zip(hidden.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
            losses = torch.cat([checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])
        return losses.view(len(codes), -1).mean(1)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Float32 [N] from hidden [N, C] and targets int64 [N]."""
        return F.cross_entropy(self.head(hidden).float(), targets, reduction="none")

    def _hidden(
        self, codes: Tensor, label: Tensor | None, condition: Tensor | None, hide: Tensor | None = None
    ) -> Tensor:
        """The input of the output head, float [B, L, C]."""
        conditioning = self.conditioning(condition, hide)
        norms = self.norms(label, conditioning.offsets)
        return self.normalise(self._through_blocks(codes, norms, conditioning), norms[-1])

    def conditioning(self, condition: Tensor | None, hide: Tensor | None = None) -> Conditioning:
        """The condition in the form that blocks use; see `Condition`."""
        if (condition is None) != (self.condition is None):
            kind = self.config.condition or "no condition"
            raise ValueError(f"a prior of {kind} got {'no' if condition is None else 'a'} condition")
        return Conditioning() if self.condition is None else self.condition(condition, hide)

    def _through_blocks(self, codes: Tensor, norms: list[Norm], conditioning: Conditioning) -> Tensor:
        """Hidden states, float [B, L, C]."""
        x = self.input(codes.flatten(1))
        if conditioning.added is not None:
            x = (x.unflatten(1, (codes.shape[1], -1)) + conditioning.added[:, :, None]).flatten(1, 2)
        if self.config.style == "modern" and torch.is_autocast_enabled(x.device.type):
            # A residual stream in half precision halves its memory traffic, which saves a twentieth of a step on a GPU.
            # Norms, attention and the loss still compute in float32. The published style keeps a float32 stream.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for index, block in enumerate(self.blocks):
            arguments = (x, self.norms_of(norms, index), self.rotation, conditioning.memory, self.mask)
            if self.training and index < self.config.num_checkpointed:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return x

    def norms_of(self, norms: list[Norm], block: int) -> list[Norm]:
        """The norms of one block, from those of the whole model."""
        return norms[self.norms_per_block * block : self.norms_per_block * (block + 1)]
