from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from clipmill.cluster.queue import MAX_LOST_NODES, MORE_LOSSES, UnitQueue

NOBODY: set[str] = set()


def take_all(queue: UnitQueue, node: str, others: set[str] = NOBODY, now: float = 1e6) -> list[int]:
    taken = []
    while (unit := queue.take(node, others, set(), now)) is not None:
        taken.append(unit)
    return taken


def test_failed_units_go_to_the_back_and_pause() -> None:
    queue = UnitQueue(4, max_failures=3)
    assert queue.take("a", NOBODY, set(), now=0) == 0
    assert queue.fail(0, "a", NOBODY, now=0)
    assert take_all(queue, "a", now=0.1) == [1, 2, 3]
    assert take_all(queue, "a", now=0.6) == [0]


def test_units_that_were_not_begun_keep_their_places() -> None:
    queue = UnitQueue(4, max_failures=3)
    taken = [queue.take("a", NOBODY, set(), now=0) for _ in range(3)]
    queue.fail(0, "a", NOBODY, now=0)
    for unit in reversed(taken[1:]):
        assert unit is not None
        queue.put_back(unit)
    assert take_all(queue, "a") == [1, 2, 3, 0]


def test_a_failed_unit_waits_for_another_node_while_there_is_one() -> None:
    queue = UnitQueue(1, max_failures=3)
    queue.take("a", {"b"}, set(), now=0)
    queue.fail(0, "a", NOBODY, now=0)
    assert take_all(queue, "a", {"b"}) == []
    assert take_all(queue, "b", {"a"}) == [0]
    queue.fail(0, "b", NOBODY, now=0)
    assert take_all(queue, "a", {"b"}) == [0]  # it has failed everywhere
    queue.fail(0, "a", NOBODY, now=0)
    assert take_all(queue, "a") == [0]


def test_trials_go_first_where_they_have_not_failed() -> None:
    queue = UnitQueue(3, max_failures=3)
    queue.take("a", {"b"}, set(), now=0)
    queue.fail(0, "a", NOBODY, now=0)
    assert queue.take("a", {"b"}, {0}, now=9) == 1
    assert queue.take("b", {"a"}, {0}, now=9) == 0


def test_a_unit_fails_after_its_attempts() -> None:
    queue = UnitQueue(2, max_failures=2)
    queue.take("a", NOBODY, set(), now=0)
    assert [queue.fail(0, "a", NOBODY, now=0) for _ in range(3)] == [True, True, False]
    assert (queue.num_unfinished, queue.attempts(0)) == (1, 3)


def test_failures_on_a_sick_node_are_forgiven() -> None:
    queue = UnitQueue(1, max_failures=1)
    assert queue.fail(0, "a", NOBODY, now=0)
    assert not queue.fail(0, "a", NOBODY, now=0)
    assert queue.num_unfinished == 0
    assert queue.forgive({"b"}) == []
    assert queue.forgive({"a"}) == [0]
    assert queue.forgive({"a"}) == []
    assert queue.num_unfinished == 1
    assert queue.fail(0, "b", {"a"}, now=0)


def test_lost_nodes_cost_a_unit_nothing() -> None:
    queue = UnitQueue(1, max_failures=0)
    for number in range(MAX_LOST_NODES):
        # When the loss is reported, Ray may still take the node for alive.
        assert queue.lose(0, f"node-{number}", {f"node-{number}", "head"}, now=0)
    assert not queue.lose(0, "last", {"last", "head"}, now=0)


def test_a_unit_that_ends_its_workers_again_and_again_is_given_up() -> None:
    queue = UnitQueue(1, max_failures=1)
    again = [queue.lose(0, "a", {"a"}, now=0) for _ in range(2 + MORE_LOSSES)]
    assert again == [True] * (1 + MORE_LOSSES) + [False]
    assert queue.num_unfinished == 0
    assert queue.forgive({"a"}) == []


@given(st.randoms(use_true_random=False), st.integers(0, 30), st.integers(0, 3))
def test_no_unit_is_lost_or_doubled(chance: random.Random, num_units: int, max_failures: int) -> None:
    queue = UnitQueue(num_units, max_failures)
    nodes, done, failed, held, now = ["a", "b", "c"], [], [], [], 0.0
    while queue.num_unfinished:
        now += 60
        node = chance.choice(nodes)
        unit = queue.take(node, set(nodes) - {node}, set(range(0, num_units, 2)), now)
        if unit is not None:
            held.append((unit, node))
        if held and (chance.random() < 0.5 or unit is None):
            unit, node = held.pop(chance.randrange(len(held)))
            what = chance.choice(["finish", "fail", "lose", "put_back"])
            if what == "finish":
                queue.finish(unit)
                done.append(unit)
            elif what == "put_back":
                queue.put_back(unit)
            elif not (
                queue.fail(unit, node, NOBODY, now) if what == "fail" else queue.lose(unit, node, set(nodes), now)
            ):
                failed.append(unit)
    assert sorted(done + failed) == list(range(num_units))
    assert (queue.num_waiting, held) == (0, [])
