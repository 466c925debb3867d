"""Finds the nearest training clip of each sample, which shows whether a prior repeats its training data.

Clips are compared by the embeddings of their codes, averaged over cells of time, height and width. A distance alone
means little. It is therefore divided by the usual distance: the median distance from a validation clip, which was not
trained on, to its nearest training clip.

    N, B: clips   t, h, w: frames, height, width of the latents   M: codebooks   F: features of a clip
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clipmill.evaluation.parts import Arrays
from clipmill.models.vqvae import VQVAE

__all__ = ["describe_codes", "nearest_section"]

MOST_SHOWN = 4
"""Pairs of a sample and its nearest training clip that are named and shown."""
_CELLS = 4
"""Number of cells along time, height and width, if the latents are not smaller."""
_CHANNELS = 16
"""Embeddings with more dimensions are projected at random, which changes distances by a few percent."""
_CLOSE_PERCENTILE = 1
"""A sample is close if it is nearer to the training clips than all but this percentage of the validation clips."""
_BLOCK = 1024


def describe_codes(codes: Tensor, tokenizer: VQVAE) -> NDArray[np.float16]:
    """Features of clips, for distances between them: float16 [B, F].

    Args:
        codes: int64 [B, t, h, w] or [B, t, h, w, M], on the tokenizer's device.
        tokenizer: in eval mode.
    """
    embedded = tokenizer.quantizer.embed(codes[..., None] if tokenizer.config.num_codebooks == 1 else codes).float()
    num_dimensions = embedded.shape[-1]
    if num_dimensions > _CHANNELS:
        directions = torch.randn(num_dimensions, _CHANNELS, generator=torch.Generator().manual_seed(0))
        embedded = embedded @ directions.to(embedded.device) / _CHANNELS**0.5
    depth, height, width = (min(_CELLS, length) for length in embedded.shape[1:4])
    return F.adaptive_avg_pool3d(embedded.movedim(-1, 1), (depth, height, width)).flatten(1).half().cpu().numpy()


def nearest_section(made: Arrays, val: Arrays, train: Arrays) -> dict[str, Any] | None:
    """How close the samples are to the training clips, as plain JSON values.

    Args:
        made: for the samples: ``place``, features of `describe_codes`, float16 [N, F], and ``key``.
        val: the same for validation clips.
        train: the same for training clips.

    Returns:
        ``num_training``: number of training clips that were searched; ``median``: the samples' median distance divided
        by the usual one (near 1: as far from training clips as unseen clips; far below 1: copies); ``close_share``:
        share of samples that are close (0.01 of the validation clips are); ``pairs``: the closest samples and their
        training clips, by key and by number, each with its distance divided by the usual one. None if a set is empty,
        or if half of the validation clips equal a training clip.
    """
    if not min(len(found["place"]) for found in (made, val, train)):
        return None
    _, usual = _nearest(val["place"], train["place"])
    numbers, distances = _nearest(made["place"], train["place"])
    unit = float(np.median(usual))
    if not unit:
        return None
    closest = np.argsort(distances, kind="stable")[:MOST_SHOWN].tolist()
    return {
        "num_training": len(train["place"]),
        "median": float(np.median(distances)) / unit,
        "close_share": float(np.mean(distances < np.percentile(usual, _CLOSE_PERCENTILE))),
        "pairs": [
            {
                "sample": str(made["key"][number]),
                "training": str(train["key"][numbers[number]]),
                "distance": float(distances[number]) / unit,
                "numbers": [number, int(numbers[number])],
            }
            for number in closest
        ],
    }


def _nearest(clips: NDArray[np.float16], train: NDArray[np.float16]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The number of each clip's nearest training clip, int64 [N], and its distance, float64 [N]."""
    training = torch.from_numpy(train).float()
    blocks = torch.from_numpy(clips).float().split(_BLOCK)
    numbers = torch.cat([torch.cdist(block, training).argmin(1) for block in blocks]).numpy()
    # The found distances are computed again: cdist multiplies matrices, so equal clips may not have distance 0.
    differences = clips.astype(np.float64) - train[numbers].astype(np.float64)
    return numbers, np.sqrt(np.square(differences).sum(axis=1))
