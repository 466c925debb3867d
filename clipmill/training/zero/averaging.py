"""An exponential moving average of the weights, in addition to the trained weights.

The average of a parameter is stored next to its float32 master (see ``partitions.py``), as one more entry of the
optimizer's state. It is therefore partitioned, offloaded, saved, resumed and converted like the moments, and costs 4
bytes for each parameter of a rank. Buffers (batch statistics, the codebook) are averaged too, in separate buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipmill.training.zero.partitions import masters, optimizer_states, refresh_weights

__all__ = ["AVERAGE", "Averages", "BufferAverages", "averaged_buffers"]

AVERAGE = "average"
"""Name of the entry in the optimizer's state."""
_MODULE = "averages"


class BufferAverages(nn.Module):
    """Averages of a module's floating-point buffers, kept as buffers in the module's own state."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                self.register_buffer(name.replace(".", "/"), buffer.clone())
        module.add_module(_MODULE, self)


def averaged_buffers(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of a checkpoint, each replaced by its average if there is one."""
    prefix = f"{_MODULE}."
    averages = {
        name.removeprefix(prefix).replace("/", "."): value for name, value in buffers.items() if name.startswith(prefix)
    }
    return {name: averages.get(name, value) for name, value in buffers.items() if not name.startswith(prefix)}


class Averages:
    """The averages of one engine.

    Args:
        engine: DeepSpeed's engine.
        buffers: averages of its module's buffers.
    """

    def __init__(self, engine: Any, buffers: BufferAverages) -> None:
        self._engine = engine
        names = dict(engine.module.named_buffers())
        self._buffers = [(names[name.replace("/", ".")], average) for name, average in buffers.named_buffers()]

    @torch.no_grad()
    def update(self, weight: float, applied: Tensor) -> None:
        """Moves the averages towards the weights and buffers after a step.

        Args:
            weight: weight of the new values; 1 replaces the averages by them.
            applied: float32 0-d; 0 for a skipped step, which leaves the averages unchanged.
        """
        states = optimizer_states(self._engine)
        for master in masters(self._engine):
            state = states.get(master)
            if state and AVERAGE not in state:  # at the first step
                state[AVERAGE] = master.detach().clone()
        for current, average in self._pairs():
            average.lerp_(current, (weight * applied).to(average.device, non_blocking=True))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces weights and buffers by their averages during the block; no step may be taken. Collective."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for current, average in self._pairs():
            before = current.clone()
            current.copy_(average)
            average.copy_(before)
        refresh_weights(self._engine)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        states = optimizer_states(self._engine)
        weights = [(master, states[master][AVERAGE]) for master in masters(self._engine) if AVERAGE in states[master]]
        return weights + self._buffers
