"""Small TorchScript networks with the very signatures of I3D, C3D and LPIPS, written as users' files are."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class TinyI3D(nn.Module):
    """400 smooth random features of uint8 clips; refuses what the real one would not understand."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(400, 3 * 9 * 4 * 4, generator=generator) / 8)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8, "not uint8"
        assert x.shape[1] == 3, "not B C T H W"
        assert rescale and resize and return_features, "called otherwise than FVD is"  # noqa: PT018
        pooled = nn.functional.adaptive_avg_pool3d(x.float() / 127.5 - 1, [9, 4, 4])
        return torch.sin(pooled.flatten(1) @ self.weight.t())


class TinyC3D(nn.Module):
    """Probabilities of 101 classes by the brightness of the 16 frames."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8, "not uint8"
        assert x.shape[1] == 3 and x.shape[2] == 16, "not B 3 16 H W"  # noqa: PT018
        brightness = x.float().mean((1, 3, 4)) / 16
        return nn.functional.pad(brightness, [0, 85]).softmax(-1)


class TinyLPIPS(nn.Module):
    """Mean square difference, in the shape [N, 1, 1, 1] that the LPIPS package has."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == torch.float32 and a.shape[1] == 3, "not float32 N 3 H W"  # noqa: PT018
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def save(module: nn.Module, path: Path) -> str:
    """Writes a TorchScript file; its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the published files are TorchScript all the same
        torch.jit.script(module).save(str(path))
    return str(path)
