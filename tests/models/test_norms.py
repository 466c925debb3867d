from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipmill.models.norms import EPS, scaled_to_unit


@pytest.mark.parametrize("with_gain", [False, True])
def test_it_is_torchs_rms_norm_with_its_gradients(with_gain: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64).float().requires_grad_()
    gain = torch.randn(8, requires_grad=True) if with_gain else None
    inputs = [x] if gain is None else [x, gain]
    weight = torch.randn(2, 5, 8)
    ours, torchs = scaled_to_unit(x, gain), F.rms_norm(x, (8,), gain, EPS)
    torch.testing.assert_close(ours, torchs)
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, torchs))
    for our, its in zip(*gradients, strict=True):
        torch.testing.assert_close(our, its)


def test_in_bfloat16_small_gains_still_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    gain = torch.full((256,), 1.003, requires_grad=True)  # 1 + 3 / 1000 is no bfloat16
    y = scaled_to_unit(x, gain)
    assert y.dtype == torch.bfloat16
    exact = F.rms_norm(x.float(), (256,), gain, EPS)
    assert (y.float() / exact).mean().item() == pytest.approx(1, abs=5e-4)
    y.float().sum().backward()
    assert x.grad is not None
    assert gain.grad is not None
    assert (x.grad.dtype, gain.grad.dtype) == (torch.bfloat16, torch.float32)
