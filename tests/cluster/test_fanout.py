from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from clipmill.cluster import fan_out
from clipmill.config import ClusterConfig
from clipmill.errors import StageFailed, UserError

pytestmark = pytest.mark.usefixtures("embedded")


def run(make_worker: Callable[..., Any], arguments: tuple[Any, ...], units: Any, **keys: Any) -> list[tuple[Any, Any]]:
    results: list[tuple[Any, Any]] = []
    config = ClusterConfig(**{"fanout_workers": 1, "max_failures": 1, **keys})
    fan_out(make_worker, arguments, units, config=config, on_result=lambda unit, result: results.append((unit, result)))
    return results


def make_recorder(folder: str) -> Callable[[str], dict[str, Any]]:
    """A worker that notes each attempt at a unit; what a unit is called says what becomes of it."""

    def work(unit: str) -> dict[str, Any]:
        attempt = 1
        while (note := Path(folder) / f"{unit}-{attempt}").exists():
            attempt += 1
        note.touch()
        time.sleep(0.05)
        if unit.startswith("dies-once") and attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.startswith("raises-once") and attempt == 1:
            raise ValueError("first time")
        if unit.startswith("poison"):
            raise ValueError(f"cannot do {unit}")
        if unit.startswith("user"):
            raise UserError("no such folder; name another")
        return {"attempt": attempt, "pid": os.getpid()}

    return work


def test_units_run_in_order_on_one_actor(tmp_path: Path) -> None:
    units = [f"unit-{number}" for number in range(12)]
    results = run(make_recorder, (str(tmp_path),), units)
    assert [unit for unit, _ in results] == units
    assert len({result["pid"] for _, result in results}) == 1


def test_work_is_spread_over_actors(tmp_path: Path) -> None:
    results = run(make_recorder, (str(tmp_path),), [f"unit-{number}" for number in range(60)], fanout_workers=2)
    assert len(results) == 60
    assert len({result["pid"] for _, result in results}) == 2


def test_a_lost_unit_is_done_again_at_the_end_on_a_fresh_actor(tmp_path: Path) -> None:
    results = run(make_recorder, (str(tmp_path),), ["a", "dies-once", "b", "raises-once", "c"])
    assert [(unit, result["attempt"]) for unit, result in results] == [
        ("a", 1),
        ("b", 1),
        ("c", 1),
        ("dies-once", 2),
        ("raises-once", 2),
    ]
    pids = {unit: result["pid"] for unit, result in results}
    assert pids["a"] != pids["b"] != pids["c"] == pids["dies-once"] == pids["raises-once"]


def make_bell_killer() -> Callable[[str], dict[str, Any]]:
    """A worker whose unit "kills" ends the process of the fan-out's bell, once."""

    def work(unit: str) -> dict[str, Any]:
        if unit == "kills":
            siblings = psutil.Process().parent().children()
            bells = [process for process in siblings if "".join(process.cmdline()).startswith("ray::Bell")]
            assert bells
            for process in bells:
                process.send_signal(signal.SIGKILL)
            time.sleep(1)  # the news must reach this process while it has a unit
        return {"pid": os.getpid()}

    return work


def test_the_end_of_the_bells_process_costs_no_unit() -> None:
    results = run(make_bell_killer, (), ["a", "kills", "b", "c"], max_failures=0)
    assert [unit for unit, _ in results] == ["a", "kills", "b", "c"]
    assert len({result["pid"] for _, result in results}) == 1


def test_a_poisonous_unit_fails_after_the_others_have_finished(tmp_path: Path) -> None:
    results: list[str] = []
    config = ClusterConfig(fanout_workers=2, max_failures=2)
    with pytest.raises(StageFailed, match=r"1 of 5 units failed; unit 'poison' 3 times, at last: ValueError: cannot"):
        fan_out(
            make_recorder,
            (str(tmp_path),),
            ["a", "poison", "b", "c", "d"],
            config=config,
            on_result=lambda unit, _: results.append(unit),
        )
    assert sorted(results) == ["a", "b", "c", "d"]


def test_a_user_error_passes_through_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no such folder; name another$") as caught:
        run(make_recorder, (str(tmp_path),), ["user", *(f"unit-{number}" for number in range(50))], max_failures=3)
    assert type(caught.value) is UserError
    assert not (tmp_path / "user-2").exists()
    assert not (tmp_path / "unit-40-1").exists()


def make_broken(tries: str) -> Callable[[int], dict[str, Any]]:
    with open(tries, "a") as file:
        file.write("x")
    raise OSError("no such model")


def test_workers_that_cannot_start_stop_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="no worker can start, at last: OSError: no such model"):
        run(make_broken, (str(tmp_path / "tries"),), range(100))
    assert (tmp_path / "tries").read_text() == "xx"


def make_counter() -> Callable[[int], dict[str, Any]]:
    import torch

    return lambda unit: {"torch": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"]}


def test_threads_follow_the_cpus_of_a_worker() -> None:
    assert run(make_counter, (), [0], fanout_cpus=3) == [(0, {"torch": 3, "omp": "3"})]


def test_impossible_resources_are_a_user_error_at_once() -> None:
    with pytest.raises(UserError, match=r"1 worker\(s\) of 64 CPU do not fit the cluster \(1 node.*largest 3 CPU"):
        run(make_counter, (), [0], fanout_cpus=64)


def test_more_workers_than_room_do_not_hold_up_the_work(tmp_path: Path) -> None:
    results = run(make_recorder, (str(tmp_path),), ["a", "b", "c"], fanout_workers=3, fanout_cpus=2)
    assert sorted(unit for unit, _ in results) == ["a", "b", "c"]
    assert len({result["pid"] for _, result in results}) == 1


def make_timer() -> Callable[[int], dict[str, Any]]:
    def work(unit: int) -> dict[str, Any]:
        began = time.monotonic()  # one clock for all processes of a machine
        time.sleep(0.3)
        return {"began": began, "ended": time.monotonic()}

    return work


def test_nodes_short_of_memory_get_one_unit_at_a_time_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipmill.cluster.workers.MIN_FREE_SHARE", 2.0)  # no machine ever has so much
    results = run(make_timer, (), list(range(6)), fanout_workers=2)
    spans = sorted((result["began"], result["ended"]) for _, result in results)
    assert len(spans) == 6
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


def test_cpus_beside_those_of_the_threads_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 worker\(s\) of 10 CPU do not fit .*tokenize\.decode_cpus"):
        fan_out(
            make_recorder,
            (str(tmp_path),),
            ["unit"],
            config=ClusterConfig(fanout_cpus=1),
            on_result=lambda unit, result: None,
            beside_cpus=9,
        )
