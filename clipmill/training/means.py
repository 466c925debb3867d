"""Means over the clips of all ranks, summed on the device and fetched at once."""

from __future__ import annotations

import torch
from torch import Tensor

from clipmill.training.world import World

__all__ = ["WeightedMeans"]


class WeightedMeans:
    """Means of 0-d tensors over weighted clips."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, weight: Tensor, means: dict[str, Tensor]) -> None:
        """Adds the means over some of this rank's clips, whose weights sum to ``weight``."""
        for name, term in {**{name: mean * weight for name, mean in means.items()}, "weight": weight}.items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def sum_of(self, name: str) -> Tensor:
        """This rank's weighted sum so far, 0-d on the device."""
        return self._sums[name]

    def fetch(self, world: World) -> dict[str, float]:
        """The means over all ranks' clips; empty if no rank added any. Collective; waits for the device."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name].float() for name in names]).tolist()
        totals = dict(zip(names, world.sum(sums), strict=True))
        weight = totals.pop("weight")
        return {name: total / weight for name, total in totals.items()}
