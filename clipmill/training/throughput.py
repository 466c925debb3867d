"""Measures the speed of a training, its share of the hardware's peak (MFU), and the time it waits for data."""

from __future__ import annotations

import logging
import re
import resource
import time
from collections.abc import Callable

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from clipmill.config import TrainingConfig, VQVAEModelConfig
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.training.world import World

__all__ = ["Stopwatch", "peak_flops", "peak_share_per_clip", "prior_flops_per_token", "vqvae_flops_per_clip"]

logger = logging.getLogger(__name__)

_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Dense, without sparsity, from the manufacturers' data sheets. The first matching name counts: longer names first.
    "H100 PCIe": {"bfloat16": 756, "tf32": 378, "float32": 51},
    "H100 NVL": {"bfloat16": 835, "tf32": 417, "float32": 60},
    "H100": {"bfloat16": 989, "tf32": 495, "float32": 67},
    "H200 NVL": {"bfloat16": 835, "tf32": 417, "float32": 60},
    "H200": {"bfloat16": 989, "tf32": 495, "float32": 67},
    "H800": {"bfloat16": 989, "tf32": 495, "float32": 67},
    "GH200": {"bfloat16": 989, "tf32": 495, "float32": 67},
    "H20": {"bfloat16": 148, "tf32": 74, "float32": 44},
    "B200": {"bfloat16": 2250, "tf32": 1125, "float32": 75},
    "B300": {"bfloat16": 2250, "tf32": 1125, "float32": 75},
    "GB200": {"bfloat16": 2500, "tf32": 1250, "float32": 80},
    "GB300": {"bfloat16": 2500, "tf32": 1250, "float32": 80},
    "A100": {"bfloat16": 312, "tf32": 156, "float32": 19.5},
    "A800": {"bfloat16": 312, "tf32": 156, "float32": 19.5},
    "L40S": {"bfloat16": 362, "tf32": 183, "float32": 91.6},
    "L40": {"bfloat16": 181, "tf32": 90.5, "float32": 90.5},
    "A10": {"bfloat16": 125, "tf32": 62.5, "float32": 31.2},
    "L4": {"bfloat16": 121, "tf32": 60.5, "float32": 30.3},
    "MI300X": {"bfloat16": 1307, "tf32": 653.7, "float32": 163},
    "MI325X": {"bfloat16": 1307, "tf32": 653.7, "float32": 163},
}


_LOOKED_UP = {"input.embedding", "norms.table"}
"""Lookup tables: reading rows of them needs no arithmetic."""
_OF_CONDITION = re.compile(r"condition\.|blocks\.\d+\.cross\.kv\.")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak floating-point operations per second of one device; None if the device is unknown.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: ``bfloat16``, ``tf32`` or ``float32``.
    """
    words = device_name.replace("-", " ").split()
    for name, peaks in _PEAK_TFLOPS.items():
        if all(word in words for word in name.split()):
            return peaks[precision] * 1e12
    return None


def prior_flops_per_token(prior: Prior) -> float:
    """Floating-point operations per token, forward and backward, without recomputation.

    Operations on a condition are not counted, because they depend on its length. A conditioned prior therefore needs
    more operations than this.
    """
    config = prior.config
    in_products = sum(
        parameter.numel()
        for name, parameter in prior.named_parameters()
        if parameter.dim() > 1 and name not in _LOOKED_UP and not _OF_CONDITION.match(name)
    )
    in_products -= (prior.input.num_codebooks - 1) * prior.num_codes * config.hidden_dim  # logits of other codebooks
    attended = prior.num_positions * (1.0 if prior.mask is None else prior.mask.share)
    # A multiply-add is 2 operations forward and 4 backward; a position attends to half the clip on average.
    return 6 * in_products + 6 * config.num_layers * config.hidden_dim * attended


def vqvae_flops_per_clip(config: VQVAEModelConfig, num_frames: int, size: tuple[int, int]) -> float:
    """Floating-point operations per clip of (H, W) pixels, forward and backward, counted on tensors without memory."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = VQVAE(config, pixel_variance=1.0).eval()  # in eval mode it has no collectives
        model(torch.zeros(1, 3, num_frames, *size)).loss.backward()
    return counter.get_total_flops()


def peak_share_per_clip(
    flops_per_clip: Callable[[], float] | None, config: TrainingConfig, world: World
) -> float | None:
    """Seconds per clip at the combined peak of all devices; None if the peak is unknown.

    Args:
        flops_per_clip: floating-point operations of a clip; None if they are unknown.
        config: gives the precision, and the peak if it is set.
        world: gives the devices.
    """
    if world.device.type != "cuda" or flops_per_clip is None:
        return None
    name = torch.cuda.get_device_name(world.device)
    peak = peak_flops(name, config.precision) if config.peak_tflops is None else config.peak_tflops * 1e12
    if world.rank == 0:
        known = "unknown, so there is no MFU: set training.peak_tflops" if peak is None else f"{peak / 1e12:g} TFLOP/s"
        logger.info("peak of %s in %s: %s", name, config.precision, known)
    return None if peak is None else flops_per_clip() / (peak * world.size)


class Stopwatch:
    """Rate of the loop in the current window, and the share of time spent waiting for data.

    Args:
        tokens_per_clip: for the rate in tokens; None if clips have no tokens.
        peak_share_per_clip: seconds per clip at the combined peak of all devices; None if the peak is unknown.
    """

    def __init__(self, tokens_per_clip: int | None = None, peak_share_per_clip: float | None = None) -> None:
        self._tokens_per_clip, self._peak_share_per_clip = tokens_per_clip, peak_share_per_clip
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self._began = time.perf_counter()
        self._waited, self._clips = 0.0, 0

    def add_step(self, clips: int, waited_seconds: float) -> None:
        """Counts one step on ``clips`` clips of all ranks, and the seconds that it waited for data."""
        self._clips += clips
        self._waited += waited_seconds

    def facts(self) -> dict[str, float]:
        """Rates of this window and its share of waiting. Call it once the device has finished the steps."""
        seconds = time.perf_counter() - self._began
        rate = self._clips / seconds
        facts = {"clips_per_second": rate, "data_wait_share": self._waited / seconds, "memory_bytes": _memory_bytes()}
        if self._tokens_per_clip is not None:
            facts["tokens_per_second"] = rate * self._tokens_per_clip
        if self._peak_share_per_clip is not None:
            facts["mfu"] = rate * self._peak_share_per_clip
        return facts


def _memory_bytes() -> int:
    """Peak memory of this process: on the GPU if there is one, or else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
