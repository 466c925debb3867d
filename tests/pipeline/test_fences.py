"""Two planners of one folder at every interleaving of their reads and writes: one plan, of one of them, whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clipmill import lease as leases
from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import StageFailed
from clipmill.pipeline import planning, shard
from clipmill.pipeline.plan import Plan, load_plan
from clipmill.shards.manifest import SPLITS
from tests.pipeline.corpus import make_plan, run_config, video_bytes

OPERATIONS = (
    "list_folder",
    "read_document",
    "read_bytes",
    "publish_file",
    "create_document",
    "remove",
    "walk",
    "fetch",
)
"""Of `storage`: all that a planner does before the eyes of others."""


def write_videos(source: Path, numbers: range) -> None:
    source.mkdir(exist_ok=True)
    for number in numbers:
        (source / f"{number:03d}.mp4").write_bytes(video_bytes(number, 9))


@contextmanager
def meanwhile(monkeypatch: pytest.MonkeyPatch, before: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Runs ``act`` once, before the given operation on storage; yields the operations seen so far."""
    seen: list[str] = []

    def intrude(name: str, real: Callable) -> Callable:
        def operation(*arguments, **keywords):
            seen.append(name)
            if len(seen) == before + 1:
                act()
            return real(*arguments, **keywords)

        return operation

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(storage, name, intrude(name, getattr(storage, name)))
        yield seen


def names_of(plan: Plan) -> list[str]:
    units = [(split, number) for split in SPLITS for number in range(plan.num_units(split))]
    return [video.url for split, number in units for video in plan.unit(split, number).videos]


def make(config: RunConfig, lease: leases.Lease) -> None:
    try:
        load_plan(config)
    except FileNotFoundError:
        planning.make_plan(config, lease)


def extend(config: RunConfig, lease: leases.Lease) -> None:
    planning.extend_plan(config, lease, load_plan(config))


def retry(config: RunConfig, lease: leases.Lease) -> None:
    plan = load_plan(config)
    planning.retry_videos(config, lease, plan, [video.id for video in plan.unit("train", 0).videos])


@pytest.mark.parametrize(("first", "second"), [(make, make), (extend, extend), (extend, retry), (retry, extend)])
def test_of_two_planners_one_wins_wherever_they_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Callable, second: Callable
) -> None:
    monkeypatch.setattr(leases, "_wait_until_free", lambda *_: None)  # the first has been silent for a minute
    source = tmp_path / "source"
    num_operations = None
    before = 0
    while num_operations is None or before < num_operations:
        write_videos(source, range(4))
        config = run_config(tmp_path / f"run{before}", source)
        if first is not make:
            make_plan(config)
            write_videos(source, range(4, 6))

        def take_over(config: RunConfig = config) -> None:
            write_videos(source, range(6, 8))  # so that the two list different things
            with leases.hold(shard.folder_url(config), "shard") as lease:
                second(config, lease)

        with leases.hold(shard.folder_url(config), "shard") as lease:
            with meanwhile(monkeypatch, before, take_over) as seen:
                try:
                    first(config, lease)
                    ended = None
                except StageFailed as error:
                    ended = error
            num_operations = len(seen) if num_operations is None else num_operations
        assert ended is None or ("taken over by attempt" in str(ended) and "\n" not in str(ended))
        plan = load_plan(config)
        if first is make:
            assert len(names_of(plan)) in ((4, 6) if ended is None else (6,))
        folder = Path(config.folder("clips", "plan"))
        named = {one["file"] for one in plan.generations}
        assert {path.name for path in folder.glob("*.parquet")} == named
        planned = names_of(plan)
        retried = {name for one in range(1, len(plan.generations)) if plan.generations[one]["kind"] == "retried"
                   for name in planned if planned.count(name) == 2}  # fmt: skip
        assert len(planned) - len(retried) == len(set(planned)) == plan.num_videos
        for path in source.iterdir():
            path.unlink()
        before += 1
    assert num_operations > 3


def test_a_planner_without_the_lease_changes_nothing(tmp_path: Path) -> None:
    write_videos(tmp_path / "source", range(4))
    config = run_config(tmp_path / "run", tmp_path / "source")
    with leases.hold(shard.folder_url(config), "shard") as stale:
        pass
    make_plan(config)
    folder = Path(config.folder("clips", "plan"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_videos(tmp_path / "source", range(4, 6))
    for act in (planning.make_plan, extend, retry):
        with pytest.raises(StageFailed, match="was taken over by attempt 2 while attempt 1 still ran"):
            act(config, stale)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
