"""One real rank and a peer that only tells how far it is."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from clipmill.training.watchdog import LOOKS, Watchdog

HANG_SECONDS = 1.0


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where the process would have been ended."""
    event = threading.Event()
    monkeypatch.setattr("clipmill.training.watchdog.os._exit", lambda status: event.set())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return event


@pytest.fixture
def stopped() -> threading.Event:
    """Silences the peer."""
    return threading.Event()


@pytest.fixture
def watchdog(ended: threading.Event, stopped: threading.Event) -> Any:
    """That of rank 0 of two."""
    ports: list[int] = []

    def from_rank_zero(make: Any) -> int:
        ports.append(make())
        return ports[0]

    def tell() -> None:
        peer = dist.TCPStore("127.0.0.1", ports[0], is_master=False)
        for look in range(1000):
            peer.set("rank-1", f"{look} 0")
            if stopped.wait(HANG_SECONDS / LOOKS):
                return

    teller = threading.Thread(target=tell)
    made = Watchdog(SimpleNamespace(rank=0, size=2, from_rank_zero=from_rank_zero, barrier=teller.start), HANG_SECONDS)
    yield made
    made.close()
    stopped.set()
    teller.join()


def test_a_rank_that_stands_still_ends(watchdog: Watchdog, ended: threading.Event) -> None:
    assert ended.wait(5 * HANG_SECONDS)


def test_a_rank_that_goes_on_while_its_peers_are_asked_does_not(watchdog: Watchdog, ended: threading.Event) -> None:
    time.sleep(1.25 * HANG_SECONDS)  # its peers are asked for another 0.3
    for _ in range(20):
        watchdog.advance()
        assert not ended.wait(HANG_SECONDS / LOOKS)


def test_in_a_save_a_rank_that_answers_has_time(watchdog: Watchdog, ended: threading.Event) -> None:
    with watchdog.patient():
        assert not ended.wait(4 * HANG_SECONDS)


def test_in_a_save_a_rank_that_does_not_answer_is_named(
    watchdog: Watchdog, ended: threading.Event, stopped: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with watchdog.patient():
        stopped.set()
        assert ended.wait(5 * HANG_SECONDS)
    assert "rank 1 does not answer" in caplog.text


def test_in_a_save_a_rank_that_hangs_is_named_at_last(
    watchdog: Watchdog, ended: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("clipmill.training.watchdog.PATIENT_SECONDS", 2 * HANG_SECONDS)
    with watchdog.patient():
        watchdog.advance()  # past what rank 1 hangs in
        assert ended.wait(6 * HANG_SECONDS)
    assert "rank 1 is behind the others" in caplog.text


def test_ranks_that_both_wait_in_a_save_do_not_blame_each_other(ended: threading.Event) -> None:
    ports: list[int] = []

    def from_rank_zero(make: Any) -> int:
        ports.append(make())
        return ports[0]

    def both_told() -> None:  # before either watches, as behind the real barrier
        dist.TCPStore("127.0.0.1", ports[0], is_master=False).set("rank-1", "0 0")

    worlds = [
        SimpleNamespace(rank=0, size=2, from_rank_zero=from_rank_zero, barrier=both_told),
        SimpleNamespace(rank=1, size=2, from_rank_zero=lambda make: ports[0], barrier=lambda: None),
    ]
    with contextlib.ExitStack() as held:
        for world in worlds:
            held.enter_context(held.enter_context(contextlib.closing(Watchdog(world, HANG_SECONDS))).patient())
        assert not ended.wait(5 * HANG_SECONDS)
