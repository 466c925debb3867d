"""The worker's half of a fan-out, without Ray."""

from __future__ import annotations

import signal

import pytest

from clipmill.cluster import actor as actor_module
from clipmill.cluster.actor import FanoutActor


def test_a_unit_that_comes_with_the_signal_to_give_up_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = object.__new__(FanoutActor)
    actor._begins_units = True
    actor._is_busy = False
    actor._gives_up = False
    actor._work = lambda unit: {}
    monkeypatch.setattr(actor_module, "free_share", lambda: 1.0)
    assert actor.run(7) == (("done", {}), 1.0)
    actor._gives_up = True
    actor._on_sigterm(signal.SIGTERM, None)  # between the look at _begins_units and the unit
    assert actor.run(7) == (("returned", None), 1.0)
