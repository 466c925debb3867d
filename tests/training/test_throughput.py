from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipmill.config import PriorModelConfig, VQVAEModelConfig
from clipmill.models.prior import Prior
from clipmill.training.throughput import peak_flops, prior_flops_per_token, vqvae_flops_per_clip


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835),
        ("NVIDIA GH200 480GB", "bfloat16", 989),
        ("NVIDIA H20", "bfloat16", 148),
        ("NVIDIA H20-3e", "bfloat16", 148),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA B300 SXM6 AC", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("AMD Instinct MI300X", "bfloat16", 1307),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "bfloat16", 121),
    ],
)
def test_peaks_go_by_the_device(name, precision, tflops):
    assert peak_flops(name, precision) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 9090", "NVIDIA A1000"])
def test_there_is_no_peak_of_a_device_that_is_not_known(name):
    assert peak_flops(name, "bfloat16") is None


def test_the_formula_of_a_prior_is_what_its_step_computes():
    sizes = {"hidden_dim": 96, "num_heads": 4, "num_layers": 3, "dropout": 0.0, "attention_dropout": 0.0}
    prior = Prior(PriorModelConfig(style="modern", **sizes), (2, 4, 4), 64, None)
    codes = torch.randint(64, (2, 2, 4, 4))
    with FlopCounterMode(display=False) as counter:
        prior.loss(codes).mean().backward()
    # The counter takes attention for full, and the first layer's input needs no gradient.
    assert prior_flops_per_token(prior) * codes.numel() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_count_of_a_tokenizer_grows_with_its_clips():
    config = VQVAEModelConfig(hidden_dim=16, num_res_layers=1)
    once = vqvae_flops_per_clip(config, 4, (16, 16))
    assert once > 0
    for twice in ((8, (16, 16)), (4, (16, 32))):
        assert vqvae_flops_per_clip(config, *twice) == pytest.approx(2 * once, rel=0.1)  # attention grows faster


def test_frames_that_a_prior_is_told_of_are_no_work_of_its_tokens():
    sizes = {"hidden_dim": 48, "num_heads": 4, "num_layers": 2}
    untold = Prior(PriorModelConfig(**sizes), (2, 4, 4), 64, torch.zeros(64, 8))
    told = Prior(PriorModelConfig(condition="frames", **sizes), (2, 4, 4), 64, torch.zeros(64, 8), 0, (1, 16, 16, 3))
    more = prior_flops_per_token(told) / prior_flops_per_token(untold)
    assert 1 < more < 2  # queries and outputs of the cross-attention; the network over frames has 34 M weights
