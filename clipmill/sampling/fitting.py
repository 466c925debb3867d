"""Finds the batch size of sampling if it is not configured."""

from __future__ import annotations

import dataclasses

import torch

from clipmill.config import SampleConfig
from clipmill.models.memory import MAX_BATCH, largest_batch
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.sampling.kept import Kept
from clipmill.sampling.long import Batch, VideoLength, sample_videos
from clipmill.sampling.settings import draw_by

__all__ = ["batch_size_for", "draw_some", "most_at_once"]

CPU_BATCH = 16


def most_at_once(settings: SampleConfig, use_gpu: bool) -> int:
    """The configured batch size, or the largest that a worker may choose; units of samples are planned with it."""
    return settings.batch_size or (MAX_BATCH if use_gpu else CPU_BATCH)


def batch_size_for(settings: SampleConfig, prior: Prior, tokenizer: VQVAE, length: VideoLength) -> int:
    """The configured batch size, or the largest that fits the memory of the prior's device.

    Args:
        settings: settings of the draw.
        prior: the prior, in eval mode on its device.
        tokenizer: the tokenizer, in eval mode on the same device.
        length: length of the videos.
    """
    device = prior.head.weight.device
    if settings.batch_size is not None or device.type != "cuda":
        return most_at_once(settings, use_gpu=False)
    peaks = []
    for num_samples in (1, 2):
        torch.cuda.reset_peak_memory_stats(device)
        draw_some(settings, prior, tokenizer, length, num_samples)
        peaks.append(torch.cuda.max_memory_allocated(device))
    return largest_batch(torch.cuda.get_device_properties(device).total_memory, *peaks)


def draw_some(settings: SampleConfig, prior: Prior, tokenizer: VQVAE, length: VideoLength, num_samples: int) -> None:
    """Draws the last latent frame of a window and decodes the window, which reaches the peak memory of a batch."""
    window = dataclasses.replace(
        length, num_frames=length.window_frames, num_latents=length.window_latents, overlap_latents=0
    )
    labels = torch.zeros(num_samples, dtype=torch.int64) if prior.norms.num_classes else None
    condition = None
    if prior.condition is not None:
        dtype = torch.uint8 if length.condition == "frames" else torch.float32
        condition = torch.zeros(num_samples, *prior.condition.shape, dtype=dtype)
    known = (num_samples, prior.latent_shape[0] - 1, *prior.latent_shape[1:])
    prefix = torch.zeros(known, dtype=torch.int64) if known[1] else None
    draw = draw_by(settings, prior, range(num_samples), labels, Kept())
    list(sample_videos([Batch(draw, condition, prefix)], tokenizer, window, lambda _, videos: None))
