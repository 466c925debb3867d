"""`shard` on three separate hosts and a real S3 gateway: whatever is killed, the results are the same bytes.

``make chaos`` writes a table of recovery times to the file that CLIPMILL_CHAOS_TABLE names.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from clipmill.demo import generate
from clipmill.status import read_run
from tests.cluster.chain import PATIENCE_SECONDS, STAGES, TRAININGS, Chain, results_of
from tests.cluster.place import Site, missing
from tests.cluster.separate_hosts import SeparateHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

NUM_HOSTS = 3
NUM_VIDEOS = 48


def write_videos(folder: Path) -> None:
    generate(str(folder), num_videos=NUM_VIDEOS)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if why := missing():
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Site(tmp_path_factory.mktemp("site"), monkeypatch, write_videos, NUM_HOSTS)
        yield made
        made.remove()


# ---------------------------------------------------------------------------------------- disturbances


def busy_host(hosts: SeparateHosts, stage: str) -> int:
    """A host, not the head, on which a rank of a training or a worker of a fan-out runs."""
    name = "RayTrainWorker" if stage in TRAININGS else "FanoutActor"
    for number in range(1, NUM_HOSTS):
        for process in hosts.processes(number):
            if name in _command(process):
                return number
    raise AssertionError(f"no host works on {stage}")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_host(site: Site, chain: Chain, stage: str) -> None:
    hosts = site.cluster()
    hosts.kill(busy_host(hosts, stage))


def kill_driver(site: Site, chain: Chain, stage: str) -> None:
    drivers = [process for process in site.cluster().processes(0) if f"clipmill {stage} " in _command(process)]
    assert drivers
    for driver in drivers:
        driver.kill()


Disturb = Callable[[Site, Chain, str], None]
Alone = Callable[[str], tuple[Chain, dict[str, "Timing"]]]
"""An undisturbed run of the stages up to a last one."""
DISTURBANCES: dict[str, Disturb] = {
    "one host killed": kill_host,
    "driver killed": kill_driver,
}
TABLE_HEAD = """\
| disturbance | stage | s alone | s disturbed | s without progress |
|---|---|---|---|---|
"""
LOSES_DRIVER = (kill_driver,)


# ------------------------------------------------------------------------------------------------ runs


class Pauses:
    """Measures for how long a stage makes no progress, from its first progress to its end."""

    def __init__(self, chain: Chain, stage: str) -> None:
        self._chain, self._stage = chain, stage
        self.longest_seconds = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Pauses:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        most, since = 0, time.monotonic()
        while True:
            is_last = self._is_over.wait(0.5)
            done = self._chain.progress(self._stage)
            if done > most or is_last:
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - since)
                most, since = max(most, done), time.monotonic()
            if is_last:
                return


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one stage.

    Attributes:
        seconds: from the end of the stage before to its end.
        pause_seconds: longest time without progress after the first.
    """

    seconds: float
    pause_seconds: float


def run(site: Site, name: str, last: str, disturb: Disturb | None = None) -> tuple[Chain, dict[str, Timing]]:
    """Runs the stages up to a last one, each disturbed in its middle."""
    chain, timings = site.submit(name, last), {}
    began = time.monotonic()
    try:
        for stage in STAGES[: STAGES.index(last) + 1]:
            chain.wait_for(lambda stage=stage: chain.progress(stage) > 0, f"work of {stage}")
            with Pauses(chain, stage) as pauses:
                if disturb is not None:
                    assert not chain.is_finished(stage), f"{stage} ended before it could be disturbed"
                    disturb(site, chain, stage)
                ended = chain.wait_for(lambda stage=stage: chain.is_finished(stage), f"end of {stage}")
            timings[stage] = Timing(ended - began, pauses.longest_seconds)
            began = ended
            site.cluster()
        assert chain.process.wait(PATIENCE_SECONDS) == 0, chain.log_tail()
    finally:
        chain.close()
    return chain, timings


@pytest.fixture(scope="module")
def alone(site: Site) -> Alone:
    """Runs each chain once."""
    return functools.cache(lambda last: run(site, f"alone-{last}", last))


def check_shown(chain: Chain, last: str, loses_driver: bool) -> None:
    """What `clipmill status` has shown of each stage."""
    allowed = {"not begun", "starting", "running", "finished", *(["lost"] if loses_driver else [])}
    final = {one.stage: one.shown for one in read_run(chain.root)}
    for stage in STAGES[: STAGES.index(last) + 1]:
        states = [*chain.shown(stage), final[stage]]
        assert set(states) <= allowed, (stage, states)
        assert "running" in states, (stage, states)
        first = states.index("finished")
        assert set(states[first:]) == {"finished"}, (stage, states)
        assert "not begun" not in states[states.index("running") :], (stage, states)


def write_rows(what: str, alone: dict[str, Timing], disturbed: dict[str, Timing]) -> None:
    """Adds to the table of recovery times."""
    lines = [
        f"| {what} | {stage} | {alone[stage].seconds:.0f} | {timing.seconds:.0f} | {timing.pause_seconds:.0f} |"
        for stage, timing in disturbed.items()
    ]
    print("\n".join(lines))
    if name := os.environ.get("CLIPMILL_CHAOS_TABLE"):
        if not (path := Path(name)).exists():
            path.write_text(TABLE_HEAD)
        with path.open("a") as table:
            table.write("\n".join(lines) + "\n")


def disturbed_run_leaves_the_same(site: Site, alone: Alone, what: str, last: str) -> None:
    whole, usual = alone(last)
    chain, timings = run(site, f"{what.replace(' ', '-').replace(',', '')}-{last}", last, DISTURBANCES[what])
    write_rows(what, usual, timings)
    check_shown(chain, last, DISTURBANCES[what] in LOSES_DRIVER)
    expected, found = results_of(whole.root), results_of(chain.root)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.ci
def test_a_shard_with_a_killed_host_leaves_the_same_bytes(site: Site, alone: Alone) -> None:
    disturbed_run_leaves_the_same(site, alone, "one host killed", "shard")


def test_a_shard_with_a_killed_driver_leaves_the_same_bytes(site: Site, alone: Alone) -> None:
    disturbed_run_leaves_the_same(site, alone, "driver killed", "shard")
