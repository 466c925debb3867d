"""CUDA graphs: a step's kernels, launched together."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from clipmill.models.places import CONTEXT_MULTIPLE

__all__ = ["Graphs", "context_bucket"]

_NUM_BUCKETS = 8


class Graphs:
    """Runs functions that read and write the same tensors each time; of a key from the second time on as a graph."""

    def __init__(self) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs ``function``, of which only the key decides what it launches."""
        if key in self.graphs:
            self.graphs[key].replay()
            return
        function()  # libraries make their workspaces on first use, which no graph may contain
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        # Another thread may decode the last batch meanwhile, and allocate memory.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        self.graphs[key] = graph


def context_bucket(context: int, num_positions: int) -> int:
    """The context that a graph reads for one of ``context`` positions: short ones do not pay for long ones."""
    step = -(-num_positions // (_NUM_BUCKETS * CONTEXT_MULTIPLE)) * CONTEXT_MULTIPLE
    longest = -(-num_positions // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
    return min(-(-context // step) * step, longest)
