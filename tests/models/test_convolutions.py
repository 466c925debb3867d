from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipmill.models import convolutions
from clipmill.models.convolutions import Downsample, Pointwise, Upsample

STRIDES = [stride for stride in itertools.product((1, 2), repeat=3) if 2 in stride]


@pytest.mark.parametrize("stride", STRIDES)
def test_shrink_pads_the_larger_half_in_front(stride: tuple[int, int, int]) -> None:
    conv = Downsample(2, 3, stride)
    x = torch.randn(1, 2, 4, 4, 6)
    padding = [pad for s in reversed(stride) for pad in ((1, 1) if s == 2 else (2, 1))]
    expected = F.conv3d(F.pad(x, padding), conv.weight, conv.bias, stride)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("out_dim", [3, 8])
def test_grow_is_the_transposed_convolution_with_its_gradients(stride: tuple[int, int, int], out_dim: int) -> None:
    conv = Upsample(4, out_dim, stride)
    x = torch.randn(2, 4, 3, 4, 5, requires_grad=True)
    y = conv(x)
    t, h, w = y.shape[2:]
    assert (t, h, w) == (3 * stride[0], 4 * stride[1], 5 * stride[2])
    expected = nn.ConvTranspose3d.forward(conv, x)[:, :, :t, :h, :w]
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    sources = (x, conv.weight, conv.bias)
    gradients = torch.autograd.grad((y * direction).sum(), sources)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * direction).sum(), sources), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_pointwise_is_a_convolution_of_kernel_one() -> None:
    layer = Pointwise(4, 6)
    x = torch.randn(2, 4, 3, 4, 5)
    torch.testing.assert_close(layer(x), F.conv3d(x, layer.weight[..., None, None, None], layer.bias))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", STRIDES)
def test_what_a_gpu_computes_is_the_same(
    stride: tuple[int, int, int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space-to-depth and kernels of stride 1 against torch's own convolutions, in float64 on the CPU."""
    for conv in (Downsample(3, 5, stride, causal), Upsample(5, 4, stride, causal), Upsample(5, 3, stride, causal)):
        conv.double()
        x = torch.randn(2, conv.in_channels, 5 if causal else 4, 4, 6, dtype=torch.float64, requires_grad=True)
        sources = (x, conv.weight, conv.bias)
        results = []
        for is_gpu in (False, True):
            monkeypatch.setattr(convolutions, "is_on_gpu", lambda _, is_gpu=is_gpu: is_gpu)
            y = conv(x)
            direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
            results.append((y, *torch.autograd.grad((y * direction).sum(), sources)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
