"""An embedded Ray starts on a busy machine, or says in one line that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from clipmill.cluster import connection
from clipmill.cluster.connection import START_ATTEMPTS, connect
from clipmill.config import ClusterConfig
from clipmill.errors import Interrupted, StageFailed, UserError

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


def test_a_cluster_without_room_is_waited_for_and_then_worth_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [connection.Node("n", "host", {"CPU": 2.0})]
    monkeypatch.setattr(connection, "living_nodes", lambda: small)
    config = ClusterConfig(address="head:6379", wait_seconds=30)
    connection.require_capacity(config, {"CPU": 2.0}, 3, waited_seconds=29)
    connection.require_capacity(config, {"CPU": 2.0}, 1, waited_seconds=31)
    with pytest.raises(Interrupted, match=r"3 worker\(s\) of 2 CPU do not fit .*the largest 2 CPU") as caught:
        connection.require_capacity(config, {"CPU": 2.0}, 3, waited_seconds=31)
    assert caught.value.exit_status == 75
    with pytest.raises(UserError, match="do not fit"):
        connection.require_capacity(ClusterConfig(), {"CPU": 2.0}, 3, waited_seconds=0)
