"""TorchScript networks of fixed random features: a perceptual distance and the feature maps behind it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class RandomFeatures(nn.Module):
    """Feature maps of frames [N, 3, H, W] in [-1, 1] at three scales."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for before, width in ((3, 16), (16, 32), (32, 64)):
            layer = nn.Conv2d(before, width, 3, padding=1)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / 9 / before) ** 0.5)
                layer.bias.zero_()
            self.layers.append(layer)

    def forward(self, frames: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for layer in self.layers:
            frames = torch.relu(layer(frames))
            maps.append(frames)
            frames = nn.functional.avg_pool2d(frames, 2)
        return maps


class RandomDistance(nn.Module):
    """Squared differences of normalised `RandomFeatures`, as LPIPS takes them of trained ones: [N, 1, 1, 1].

    TorchScript knows no ``strict`` of `zip`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = RandomFeatures()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(a.shape[0], 1, 1, 1)
        for x, y in zip(self.features(a), self.features(b)):  # noqa: B905
            x, y = nn.functional.normalize(x, dim=1), nn.functional.normalize(y, dim=1)
            total = total + (x - y).square().sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


def save(module: nn.Module, path: Path) -> str:
    """Writes a TorchScript file; its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # files that users bring are TorchScript all the same
        torch.jit.script(module).save(str(path))
    return str(path)
