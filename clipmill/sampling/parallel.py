"""Many positions at once, by fixed-point iteration (predictive sampling, Wiggers & Hoogeboom, arXiv 2002.09928).

With the noise fixed, the codes of a sample are the only fixed point of the map from codes to the codes drawn from the
logits that they give. A pass applies the map to a window of positions. Its first position sees decided codes alone, so
its draw is right, and so is each next one as long as the guesses before it were; the window then begins behind the last
right draw. What comes out is what the sequential decoder draws, where logits that differ by rounding do not decide.
"""

from __future__ import annotations

import torch

from clipmill.models.places import HostPlaces
from clipmill.sampling.drawing import Drawing

__all__ = ["WINDOW", "decode_in_parallel"]

WINDOW = {"cpu": 16, "cuda": 64}
"""Positions of a pass. On a CPU a pass of 16 costs little more than one position, as it reads the weights once."""


def decode_in_parallel(drawing: Drawing, window: int | None = None) -> int:
    """Draws all positions that are not given; the host waits for each pass.

    Args:
        drawing: the batch.
        window: positions of a pass; None: what suits the device.

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
    """Guesses that the codes of positions first .. end - 1 are those of the latent frame before; returns ``end``."""
    if first < end:
        source = torch.arange(first, end, device=drawing.device) - drawing.per_frame
        guesses = drawing.codes[:, source.clamp(min=0)].masked_fill(source < 0, 0)
        drawing.put(HostPlaces(first, end - first), guesses)
    return end


def _num_right(codes: torch.Tensor, guesses: torch.Tensor) -> int:
    """Draws [B, n] that are right in every sample, from the first on: up to the first that was not guessed."""
    wrong = (codes != guesses).any(0)
    return int(torch.where(wrong.any(), wrong.int().argmax() + 1, codes.shape[1]))
