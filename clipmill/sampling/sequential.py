"""The sequential decoder: draws one position after another."""

from __future__ import annotations

import functools

import torch

from clipmill.models.places import DevicePlaces, HostPlaces
from clipmill.sampling.drawing import Drawing
from clipmill.sampling.graphs import Graphs, context_bucket

__all__ = ["decode_sequentially"]


def decode_sequentially(drawing: Drawing) -> None:
    """Draws all positions that are not given; nothing in the loop waits for the device."""
    if device_counts(drawing.device):
        drawing.step = drawing.step or DeviceStep(drawing)
        drawing.step.draw_all()
        return
    for position in range(drawing.num_given, drawing.num_positions):
        places = HostPlaces(position, 1)
        logits = drawing.logits(places)
        drawing.examine(logits)
        drawing.put(places, drawing.draw(logits, drawing.noise_at(places)))
        drawing.tell(position + 1)


def device_counts(device: torch.device) -> bool:
    """Whether the device counts the positions itself, so that one CUDA graph serves many of them."""
    return device.type == "cuda"


class DeviceStep:
    """A step whose position is stored on the device: all positions of a bucket use the same kernels and memory.

    Its CUDA graphs serve all batches of its drawing.
    """

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.graphs = Graphs()
        self.position = torch.zeros(1, dtype=torch.int64, device=drawing.device)
        self.slot = torch.zeros_like(self.position)
        """Index of the position's noise in ``noise``."""
        shape = (drawing.num_samples, drawing.noise_positions, drawing.num_codes)
        self.noise = torch.empty(shape, device=drawing.device)

    def draw_all(self) -> None:
        """Draws the batch that the drawing has begun."""
        drawing = self.drawing
        self.position.fill_(drawing.num_given)
        for position in range(drawing.num_given, drawing.num_positions):
            self.refill(position)
            context = context_bucket(position + 1, drawing.num_positions)
            codebook = position % drawing.num_codebooks
            self.graphs.run((context, codebook), functools.partial(self, context, codebook))
            drawing.tell(position + 1)

    def refill(self, position: int) -> None:
        """Computes the noise of the next positions once the last block is used up; the host counts too."""
        drawing = self.drawing
        if (position - drawing.num_given) % drawing.noise_positions == 0:
            count = min(drawing.noise_positions, drawing.num_positions - position)
            self.noise[:, :count] = drawing.noise.at(drawing.offset + position, count)
            self.slot.zero_()

    def __call__(self, context: int, codebook: int) -> None:
        """Draws the codes of the current position and advances to the next."""
        places = DevicePlaces(self.position, context, codebook)
        logits = self.drawing.logits(places)
        self.drawing.examine(logits)
        self.drawing.put(places, self.drawing.draw(logits, self.noise.index_select(1, self.slot)))
        self.position += 1
        self.slot += 1
