from __future__ import annotations

import logging

import pytest

from clipmill.cluster.nodes import HOPELESS_UNITS, NodeWatch
from clipmill.cluster.pauses import MAX_PAUSE_SECONDS, pause


@pytest.fixture
def nodes() -> NodeWatch:
    watch = NodeWatch()
    for name in ("a", "b", "c"):
        watch.add(name, f"host-{name}")
    return watch


def test_a_node_is_sick_once_two_of_its_failed_units_succeed_elsewhere(
    nodes: NodeWatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.failed("a", 1, began=0, cause="No space left", now=1)
    nodes.succeeded("b", 1, now=2)
    assert not nodes.sick
    nodes.failed("a", 2, began=3, cause="No space left on device", now=4)
    nodes.succeeded("b", 2, now=5)
    assert nodes.sick == {"a"}
    nodes.failed("a", 3, began=4, cause="again", now=6)
    nodes.succeeded("b", 3, now=7)
    assert caplog.messages == [
        "node host-a (a) gets no more units: units fail there that succeed elsewhere, at last: No space left on device"
    ]


def test_a_success_clears_a_node(nodes: NodeWatch) -> None:
    for number in range(0, 20, 2):
        nodes.failed("a", number, began=number, cause="broken pipe", now=number)
        nodes.succeeded("b", number, now=number + 0.5)
        nodes.succeeded("a", number + 1, now=number + 1)
    assert not nodes.sick


def test_an_outage_of_everything_condemns_nobody(nodes: NodeWatch) -> None:
    for unit, name in enumerate("abcabc"):
        nodes.failed(name, unit, began=0, cause="storage is away", now=1)
    for unit in range(6):  # c is the first to find the storage again, while the others still pause
        nodes.succeeded("c", unit, now=10 + unit)
    assert not nodes.sick
    assert all(nodes.may_work(name, 0, now=100) for name in "abc")


def test_a_unit_that_fails_everywhere_condemns_nobody(nodes: NodeWatch) -> None:
    nodes.failed("a", 7, began=0, cause="flaky", now=1)
    nodes.succeeded("b", 7, now=2)
    for name in "abc":
        nodes.failed(name, 13, began=3, cause="poison", now=4)
    assert not nodes.sick


def test_two_of_three_nodes_can_be_sick(nodes: NodeWatch) -> None:
    for unit in range(4):
        nodes.failed("a", unit, began=10 * unit, cause="full", now=10 * unit + 1)
        nodes.failed("b", unit, began=10 * unit + 1, cause="full", now=10 * unit + 2)
        nodes.succeeded("c", unit, now=10 * unit + 3)
    assert nodes.sick == {"a", "b"}


def test_a_suspect_pauses_and_works_alone(nodes: NodeWatch) -> None:
    nodes.failed("a", 0, began=0, cause="x", now=0)
    assert not nodes.may_work("a", 0, now=0.1)
    assert nodes.may_work("a", 3, now=1)
    nodes.failed("a", 1, began=0, cause="x", now=1)
    assert nodes.may_work("a", 0, now=2)
    assert not nodes.may_work("a", 1, now=2)
    assert nodes.may_work("b", 1, now=0)


def test_the_newest_failed_unit_of_a_suspect_is_tried_next_elsewhere(nodes: NodeWatch) -> None:
    nodes.failed("a", 0, began=0, cause="x", now=0)
    assert nodes.trials() == set()
    nodes.failed("a", 1, began=0, cause="x", now=0)
    assert nodes.trials() == {1}
    nodes.failed("b", 1, began=0, cause="x", now=0)  # no witness any more
    assert nodes.trials() == set()


def test_hope_ends_when_every_living_node_fails_many_units_and_none_succeeds(nodes: NodeWatch) -> None:
    assert not nodes.is_hopeless("abc", "abc")
    for unit in range(HOPELESS_UNITS):
        nodes.failed("a", unit, began=unit, cause="x", now=unit)
        nodes.failed("b", 100 + unit, began=unit, cause="x", now=unit)
    assert not nodes.is_hopeless("abc", "abc")  # c may be in the middle of its first unit
    assert nodes.is_hopeless("ab", "ab")
    assert not nodes.is_hopeless("abd", "abd")  # no worker has been placed on d yet
    nodes.succeeded("c", 500, now=1000)
    assert not nodes.is_hopeless("ab", "ab")  # c is gone, but what worked there may work on the next node


def test_starts_pause_longer_and_longer_and_warn_once(nodes: NodeWatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(12):
        nodes.start_failed("a", "libx.so: cannot open", now=0)
        nodes.succeeded("a", 1, now=0)  # by another worker there
    assert not nodes.may_start("a", now=140)
    assert nodes.num_failed_starts("a") == 12
    nodes.started("a")
    assert nodes.may_start("a", now=0)
    assert caplog.messages == ["a worker could not start on host-a (a): libx.so: cannot open"]


def test_pauses_grow_are_random_and_bounded() -> None:
    assert all(0.25 <= pause(1) <= 0.5 for _ in range(100))
    assert all(2 <= pause(4) <= 4 for _ in range(100))
    assert all(MAX_PAUSE_SECONDS / 2 <= pause(10_000) <= MAX_PAUSE_SECONDS for _ in range(100))
    assert len({pause(4) for _ in range(100)}) > 90
