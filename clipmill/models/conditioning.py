"""Conditioning beyond the class (frames, actions or a text embedding), and how it enters.

    frames    uint8 [B, n, H, W, 3]   the first frames of the clip; a 3D ResNet, then cross-attention (as published)
    actions   float [B, T, A]         one per frame of the clip; cross-attention, conditional norms, or added to inputs
    text      float [B, S, E]         embeddings from another program; cross-attention

B: batch   T: frames of the clip   t: latent frames   C: channels of the prior   S: length of the memory
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import PriorModelConfig
from clipmill.errors import UserError
from clipmill.models.positions import axial_tables, raster
from clipmill.models.resnet import FrameEncoder
from clipmill.models.vqvae import to_input

__all__ = ["Condition", "Conditioning", "condition_of", "per_latent_frame"]

FRAME_DIM = 240
"""Channels of the features of frames, as published."""


class Conditioning(NamedTuple):
    """A condition in the form that blocks use. At most one field is set."""

    memory: Tensor | None = None
    """Memory for cross-attention, float [B, S, M]."""
    offsets: Tensor | None = None
    """Offsets of the gains and biases of each norm, float [B, t, norms, 2, C]."""
    added: Tensor | None = None
    """Vector added to the input of each latent frame's positions, float [B, t, C]."""


class Condition(nn.Module):
    """Encodes the condition of a clip for the blocks of a prior.

    Args:
        config: config of the prior; ``condition`` is set.
        shape: shape of one clip's condition: [n, H, W, 3], [T, A] or [S, E].
        num_latent_frames: t.
        num_norms: norms in the prior.
    """

    def __init__(
        self, config: PriorModelConfig, shape: tuple[int, ...], num_latent_frames: int, num_norms: int
    ) -> None:
        super().__init__()
        self.kind, self.way, self.shape = config.condition, config.condition_by, shape
        self.num_latent_frames, self.num_norms = num_latent_frames, num_norms
        dim = config.hidden_dim
        self.memory_dim: int | None = None
        """M, if blocks attend to the condition."""
        if self.kind == "frames":
            self.memory_dim = FRAME_DIM
            self.encoder = FrameEncoder(FRAME_DIM)
            self.axes = axial_tables((shape[0], *(-(-length // 4) for length in shape[1:3])), FRAME_DIM)
        elif self.kind == "text":
            self.memory_dim = shape[1]
        else:
            per_frame = math.ceil(shape[0] / num_latent_frames) * shape[1]
            if self.way == "cross_attention":
                self.memory_dim = dim
                self.project = nn.Linear(per_frame, dim)
                self.axes = axial_tables((num_latent_frames,), dim)
            else:  # zero: training starts with an unconditional prior
                self.project = nn.Linear(per_frame, dim * (2 * num_norms if self.way == "norm" else 1))
                nn.init.zeros_(self.project.weight)
                nn.init.zeros_(self.project.bias)
        self.null = None
        """Replaces a hidden condition in each latent frame or row of the memory; initialised to zero."""
        if config.condition_dropout:
            self.null = nn.Parameter(torch.zeros(self.memory_dim or self.project.out_features))

    def forward(self, condition: Tensor, hidden: Tensor | None = None) -> Conditioning:
        """Encodes a condition.

        Args:
            condition: see the module's docstring for the shapes.
            hidden: clips whose condition is replaced by the null, bool [B]; needs ``condition_dropout``. None hides no
                condition.
        """
        if condition.shape[1:] != self.shape:
            raise ValueError(f"a condition of shape {tuple(condition.shape[1:])} for a prior that takes {self.shape}")
        if self.kind == "frames":
            features = self.encoder(to_input(condition)).flatten(1, 3)
            return Conditioning(memory=self._hide(features + raster(self.axes), hidden))
        if self.kind == "text":  # removes the scale of the text encoder
            return Conditioning(memory=self._hide(F.layer_norm(condition.float(), self.shape[1:]), hidden))
        projected = self.project(per_latent_frame(condition.float(), self.num_latent_frames))
        if self.way == "cross_attention":
            return Conditioning(memory=self._hide(projected + raster(self.axes), hidden))
        projected = self._hide(projected, hidden)
        if self.way == "norm":
            return Conditioning(offsets=projected.unflatten(-1, (self.num_norms, 2, -1)))
        return Conditioning(added=projected)

    def _hide(self, features: Tensor, hidden: Tensor | None) -> Tensor:
        """Features [B, S, M], replaced by the null in the hidden clips."""
        if hidden is None:
            return features
        if self.null is None:
            raise ValueError("a prior that was trained without condition_dropout cannot hide its condition")
        return torch.where(hidden[:, None, None], self.null, features)


def per_latent_frame(actions: Tensor, num_latent_frames: int) -> Tensor:
    """Actions [B, T, A] -> [B, t, ceil(T / t) * A], those of each latent frame side by side.

    If t does not divide T, the first action is repeated in front. That is so for a causal tokenizer, whose first latent
    frame is a single frame.
    """
    missing = -actions.shape[1] % num_latent_frames
    padded = torch.cat((actions[:, :1].expand(-1, missing, -1), actions), 1)
    return padded.unflatten(1, (num_latent_frames, -1)).flatten(2)


def condition_of(batch: Mapping[str, Any], config: PriorModelConfig) -> Any:
    """The field of a batch of token samples that the prior is conditioned on; None for an unconditional prior.

    Raises:
        UserError: not all clips have the condition.
    """
    if config.condition is None:
        return None
    if config.condition not in batch:
        raise UserError(
            f"the prior is conditioned on {config.condition}, which not all clips have; give every video its "
            f"{config.condition} and shard and tokenize again, or train with prior.model.condition=null"
        )
    return batch[config.condition]
