"""An embedded Ray starts on a busy machine, or says in one line that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from clipmill.cluster.connection import START_ATTEMPTS, connect
from clipmill.config import ClusterConfig
from clipmill.errors import StageFailed

TOO_SLOW = "The current node timed out during startup."


class SlowMachine:
    """Stands for Ray's start where the first ``num_failures`` attempts exceed its limit of 30 s."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures, self.attempts = num_failures, 0

    def init(self, **options: Any) -> None:
        self.attempts += 1
        if self.attempts <= self.num_failures:
            raise Exception(TOO_SLOW)  # as bare as Ray's own


def test_ray_is_started_again_after_it_was_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowMachine(START_ATTEMPTS - 1)
    monkeypatch.setattr(ray, "init", machine.init)
    with connect(ClusterConfig()):
        assert machine.attempts == START_ATTEMPTS


def test_a_ray_that_never_starts_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", SlowMachine(START_ATTEMPTS).init)
    with pytest.raises(StageFailed, match=f"did not start .* {START_ATTEMPTS} attempts: {TOO_SLOW}"):
        connect(ClusterConfig()).__enter__()
