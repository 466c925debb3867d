"""CUDA graphs: launch all kernels of a step together."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from clipmill.models.places import CONTEXT_MULTIPLE

__all__ = ["Graphs", "context_bucket"]

_NUM_BUCKETS = 8


class Graphs:
    """Runs functions that always read and write the same tensors; the second and later runs of a key replay a graph."""

    def __init__(self) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs ``function``. The key must determine the kernels that it launches."""
        if key in self.graphs:
            self.graphs[key].replay()
            return
        function()  # libraries allocate workspaces on first use, which must not be captured in a graph
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        # Another thread may be decoding the previous batch, and allocate memory.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        self.graphs[key] = graph


def context_bucket(context: int, num_positions: int) -> int:
    """Rounds a context length up to one of a few lengths, each with a graph, so that short contexts stay cheap."""
    step = -(-num_positions // (_NUM_BUCKETS * CONTEXT_MULTIPLE)) * CONTEXT_MULTIPLE
    longest = -(-num_positions // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
    return min(-(-context // step) * step, longest)
