"""What the published code computes with a VQ-VAE's checkpoint, in float64, from its facts alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class PublishedVQVAE:
    """Encoder and decoder.

    Args:
        state: weights by their published names.
        downsample: of the model.
    """

    def __init__(self, state: dict[str, Tensor], downsample: tuple[int, int, int]) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        powers = [factor.bit_length() - 1 for factor in downsample]
        self.strides = [tuple(2 if i < power else 1 for power in powers) for i in range(max(powers))]

    def encode(self, video: Tensor) -> Tensor:
        """Codes int64 [B, t, h, w] of video [B, 3, T, H, W]."""
        x = video.double()
        for i, stride in enumerate(self.strides):
            x = F.relu(self._conv(x, f"encoder.convs.{i}.conv", stride))
        x = self._stack(self._conv(x, "encoder.conv_last.conv"), "encoder.res_stack")
        rows = self._conv(x, "pre_vq_conv.conv").movedim(1, -1)
        return torch.cdist(rows.flatten(0, -2), self.state["codebook.embeddings"]).argmin(-1).view(rows.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Video [B, 3, T, H, W]."""
        x = self._conv(self.state["codebook.embeddings"][codes].movedim(-1, 1), "post_vq_conv.conv")
        x = self._stack(x, "decoder.res_stack")
        for i, stride in enumerate(self.strides):
            name = f"decoder.convts.{i}.convt"
            x = F.pad(x, _same_padding(4, stride))
            x = F.conv_transpose3d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding=3)
            x = x if i == len(self.strides) - 1 else F.relu(x)
        return x

    def _conv(self, x: Tensor, name: str, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv3d(
            F.pad(x, _same_padding(weight.shape[-1], stride)), weight, self.state.get(f"{name}.bias"), stride
        )

    def _norm(self, x: Tensor, name: str) -> Tensor:
        parts = (self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *parts))

    def _stack(self, x: Tensor, name: str) -> Tensor:
        i = 0
        while f"{name}.{i}.block.0.weight" in self.state:
            block = f"{name}.{i}.block"
            y = self._conv(self._norm(x, f"{block}.0"), f"{block}.2.conv")
            y = self._norm(self._conv(self._norm(y, f"{block}.3"), f"{block}.5.conv"), f"{block}.6").movedim(1, -1)
            x = x + sum(
                self._along(y, f"{block}.8.attn_{axis}", dim) for axis, dim in zip("wht", (3, 2, 1), strict=True)
            ).movedim(-1, 1)
            i += 1
        return self._norm(x, f"{name}.{i}")

    def _along(self, x: Tensor, name: str, axis: int) -> Tensor:
        """Attention of two heads along one axis of x [B, T, H, W, C]."""
        x = x.transpose(axis, -2)
        q, k, v = (
            (x @ self.state[f"{name}.w_{part}s.weight"].t()).unflatten(-1, (2, -1)).transpose(-2, -3) for part in "qkv"
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(-2, -3).flatten(-2)
        return (mixed @ self.state[f"{name}.fc.weight"].t() + self.state[f"{name}.fc.bias"]).transpose(axis, -2)


def _same_padding(kernel: int, stride: tuple[int, ...]) -> list[int]:
    """The larger half in front, last axis first."""
    return [side for step in reversed(stride) for side in ((kernel - step + 1) // 2, (kernel - step) // 2)]
