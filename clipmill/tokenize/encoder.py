"""A tokenizer ready to encode: on its device, in its precision, with a batch size that fits.

B: batch   T, H, W: frames, height, width   t, h, w: frames, height, width of the latents   M: codebooks
K: codes of a codebook
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipmill.config import TokenizeConfig, frame_size
from clipmill.models.memory import largest_batch
from clipmill.models.provenance import computed_with
from clipmill.models.quantizers import table_rows
from clipmill.models.vqvae import VQVAE, to_input
from clipmill.shards.format import code_dtype

__all__ = ["Encoder", "make_encoder"]

CPU_BATCH = 16
"""Larger batches encode no faster on a CPU (benchmarks/README.md)."""


@dataclass(frozen=True)
class Encoder:
    """Encodes batches. On a GPU it works asynchronously: several batches may be started before the first is
    finished.
    """

    model: VQVAE
    num_codes: int
    device: torch.device
    precision: str
    batch_size: int

    @torch.inference_mode()
    def start(self, videos: Sequence[np.ndarray]) -> Tensor:
        """Starts encoding videos, uint8 [T, H, W, 3] each; returns int64 [B, t, h, w], on a GPU before it is
        computed.
        """
        batch = torch.from_numpy(np.stack(videos))
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.model.encode(to_input(batch))

    def finish(self, codes: Tensor) -> np.ndarray:
        """Waits for the codes of `start`; returns [B, t, h, w] or [B, t, h, w, M] in the narrowest little-endian
        type.
        """
        return codes.cpu().numpy().astype(code_dtype(self.num_codes))

    def count(self, codes: npt.ArrayLike) -> np.ndarray:
        """Counts how often each code occurs in codes [..., M] (or [...] of one codebook): int64 [M * K]."""
        num_codebooks = self.model.config.num_codebooks
        rows = table_rows(torch.from_numpy(np.asarray(codes, np.int64)).view(-1, num_codebooks), self.num_codes)
        return torch.bincount(rows.flatten(), minlength=num_codebooks * self.num_codes).numpy()

    def versions(self) -> dict[str, Any]:
        """What codes depend on besides clips, tokenizer and precision; the batch size is included because of
        rounding.
        """
        return {**computed_with(self.device), "batch_size": self.batch_size}


def make_encoder(
    model: VQVAE, num_codes: int, device: torch.device, settings: TokenizeConfig, clip: dict[str, Any]
) -> Encoder:
    """Creates an encoder with the configured batch size, or with one that fits the device.

    Args:
        model: the tokenizer in eval mode.
        num_codes: K.
        device: device to compute on.
        settings: provides ``precision`` and ``batch_size``.
        clip: clip rule of the clips.
    """
    encoder = Encoder(model.to(device), num_codes, device, settings.precision, settings.batch_size or CPU_BATCH)
    if settings.batch_size is None and device.type == "cuda":
        video = np.zeros((clip["num_frames"], *frame_size(clip["resolution"]), 3), np.uint8)
        one, two = (_peak_bytes(encoder, [video] * num_clips) for num_clips in (1, 2))
        total = torch.cuda.get_device_properties(device).total_memory
        return Encoder(model, num_codes, device, settings.precision, largest_batch(total, one, two))
    return encoder


def _peak_bytes(encoder: Encoder, videos: list[np.ndarray]) -> int:
    torch.cuda.reset_peak_memory_stats(encoder.device)
    encoder.finish(encoder.start(videos))
    return torch.cuda.max_memory_allocated(encoder.device)
