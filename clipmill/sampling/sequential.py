"""One position after another."""

from __future__ import annotations

import functools

import torch

from clipmill.models.places import DevicePlaces, HostPlaces
from clipmill.sampling.drawing import Drawing
from clipmill.sampling.graphs import Graphs, context_bucket

__all__ = ["decode_sequentially"]


def decode_sequentially(drawing: Drawing) -> None:
    """Draws all positions that are not given; nothing in the loop waits for the device."""
    if drawing.device.type == "cuda":
        step = DeviceStep(drawing)
        graphs = Graphs()
        for position in range(drawing.num_given, drawing.num_positions):
            step.refill(position)
            context = context_bucket(position + 1, drawing.num_positions)
            codebook = position % drawing.num_codebooks
            graphs.run((context, codebook), functools.partial(step, context, codebook))
            drawing.tell(position + 1)
        return
    for position in range(drawing.num_given, drawing.num_positions):
        places = HostPlaces(position, 1)
        logits = drawing.logits(places)
        drawing.examine(logits)
        drawing.put(places, drawing.draw(logits, drawing.noise_at(places)))
        drawing.tell(position + 1)


class DeviceStep:
    """A step whose position the device knows: the same kernels on the same memory for every position of a bucket."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.position = torch.tensor([drawing.num_given], device=drawing.device)
        self.slot = torch.zeros_like(self.position)
        """Where the noise of the position is in ``noise``."""
        shape = (drawing.num_samples, drawing.noise_positions, drawing.noise.num_codes)
        self.noise = torch.empty(shape, device=drawing.device)

    def refill(self, position: int) -> None:
        """Makes the noise of the next positions where it is used up; the host counts along."""
        drawing = self.drawing
        if (position - drawing.num_given) % drawing.noise_positions == 0:
            count = min(drawing.noise_positions, drawing.num_positions - position)
            self.noise[:, :count] = drawing.noise.at(drawing.offset + position, count)
            self.slot.zero_()

    def __call__(self, context: int, codebook: int) -> None:
        """Draws the codes of the position and goes on to the next."""
        places = DevicePlaces(self.position, context, codebook)
        logits = self.drawing.logits(places)
        self.drawing.examine(logits)
        self.drawing.put(places, self.drawing.draw(logits, self.noise.index_select(1, self.slot)))
        self.position += 1
        self.slot += 1
