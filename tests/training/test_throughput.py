from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipmill.config import PriorModelConfig
from clipmill.models.prior import Prior
from clipmill.training.estimate import flops_per_token
from clipmill.training.throughput import peak_flops
from clipmill.training.vqvae import flops_per_clip
from tests.evaluation.toy_run import toy_config


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "bfloat16", 121),
    ],
)
def test_peaks_go_by_the_device(name, precision, tflops):
    assert peak_flops(name, precision) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 9090", "NVIDIA A1000", "NVIDIA GH200 480GB"])
def test_there_is_no_peak_of_a_device_that_is_not_known(name):
    assert peak_flops(name, "bfloat16") is None


def test_the_formula_of_a_prior_is_what_its_step_computes():
    sizes = {"hidden_dim": 96, "num_heads": 4, "num_layers": 3, "dropout": 0.0, "attention_dropout": 0.0}
    prior = Prior(PriorModelConfig(style="modern", **sizes), (2, 4, 4), 64, None)
    codes = torch.randint(64, (2, 2, 4, 4))
    with FlopCounterMode(display=False) as counter:
        prior.loss(codes).mean().backward()
    # The counter takes attention for full, and the first layer's input needs no gradient.
    assert flops_per_token(prior) * codes.numel() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_count_of_a_tokenizer_grows_with_its_clips(tmp_path):
    config = toy_config(tmp_path / "run")
    clip = config.data.clip
    once = flops_per_clip(config, clip.num_frames, clip.resolution)
    assert once > 0
    twice = flops_per_clip(config, 2 * clip.num_frames, clip.resolution)
    assert twice == pytest.approx(2 * once, rel=0.1)  # attention along time grows faster
