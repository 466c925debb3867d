"""Draws many positions at once by fixed-point iteration (predictive sampling, Wiggers & Hoogeboom, arXiv 2002.09928).

Consider the map that takes guessed codes, computes their logits, and draws codes from them. With the noise fixed, the
codes of a sample are the only fixed point of this map. A pass applies the map to a window of positions. The first
position depends only on final codes, so its draw is right. Each following draw is right as long as all guesses before
it were right. The next window starts after the last right draw. The result equals that of the sequential decoder,
except where logits that differ by rounding decide a near tie.
"""

from __future__ import annotations

import torch

from clipmill.models.places import HostPlaces
from clipmill.sampling.drawing import Drawing

__all__ = ["WINDOW", "decode_in_parallel"]

WINDOW = {"cpu": 16, "cuda": 64}
"""Positions in a pass. On a CPU, 16 positions cost little more than one, because a pass reads the weights once."""


def decode_in_parallel(drawing: Drawing, window: int | None = None) -> int:
    """Draws all positions that are not given; the host waits for each pass.

    Args:
        drawing: the batch.
        window: positions in a pass; None uses the default for the device.

    Returns:
        The number of passes.
    """
    window = WINDOW[drawing.device.type] if window is None else window
    window = -(-window // drawing.num_codebooks) * drawing.num_codebooks
    start, guessed, num_passes = drawing.num_given, drawing.num_given, 0
    while start < drawing.num_positions:
        places = HostPlaces(start, min(window, drawing.num_positions - start))
        guessed = _guess(drawing, guessed, places.context)
        logits = drawing.logits(places)
        codes = drawing.draw(logits, drawing.noise_at(places))
        num_right = _num_right(codes, places.take(drawing.codes, 1))
        drawing.examine(logits[:, :num_right])
        drawing.put(places, codes)
        start += num_right
        num_passes += 1
        drawing.tell(start)
    return num_passes


def _guess(drawing: Drawing, first: int, end: int) -> int:
    """Guesses that positions first .. end - 1 repeat the codes of the previous latent frame; returns ``end``."""
    if first < end:
        source = torch.arange(first, end, device=drawing.device) - drawing.per_frame
        guesses = drawing.codes[:, source.clamp(min=0)].masked_fill(source < 0, 0)
        drawing.put(HostPlaces(first, end - first), guesses)
    return end


def _num_right(codes: torch.Tensor, guesses: torch.Tensor) -> int:
    """Number of leading draws that are right in every sample: up to and including the first that was not guessed."""
    wrong = (codes != guesses).any(0)
    return int(torch.where(wrong.any(), wrong.int().argmax() + 1, codes.shape[1]))
