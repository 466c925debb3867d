"""Timing that is robust on a busy machine: the things that are compared alternate in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["device_name", "interleave", "ratio"]


def device_name() -> str:
    """What the timings were taken on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}"


def interleave(
    steps: dict[str, Callable[[], Any]], rounds: int, steps_per_round: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and CPU seconds of this process, of each step in each round, after two rounds to warm up.

    Args:
        steps: what to time.
        rounds: that are kept.
        steps_per_round: after which a GPU is waited for; more than one lets the host run ahead of it, as in training.
    """
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        names = list(steps) if number % 2 else list(steps)[::-1]  # the first one has colder caches
        for name in names:
            began, cpu_began = time.perf_counter(), time.process_time()
            for _ in range(steps_per_round):
                steps[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 2:
                wall[name].append((time.perf_counter() - began) / steps_per_round)
                cpu[name].append((time.process_time() - cpu_began) / steps_per_round)
    return wall, cpu


def ratio(reference: list[float], other: list[float]) -> float:
    """How many times faster ``other`` is: the median over rounds, each of which had the same noise."""
    return round(statistics.median(a / b for a, b in zip(reference, other, strict=True)), 3)
