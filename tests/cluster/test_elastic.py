"""``cluster.training_workers: {min, max}``: which sizes, when a group gives way to a larger one, what is a failure."""

from __future__ import annotations

import pytest

from clipmill.cluster import growth, launch
from clipmill.cluster.growth import Growth
from clipmill.config import ClusterConfig
from clipmill.errors import StageFailed, StorageUnavailable, UserError

CPU = {"CPU": 1.0, "GPU": 0.0}


def config(**workers: int) -> ClusterConfig:
    return ClusterConfig.model_validate({"training_workers": workers})


def test_only_usable_numbers_of_workers_are_tried() -> None:
    assert launch._sizes(config(min=2, max=6), lambda size: size % 2 == 0) == [2, 4, 6]
    assert launch._sizes(ClusterConfig(training_workers=5), lambda size: False) == [5]  # the ranks say what is wrong
    with pytest.raises(UserError, match="training_workers 5 to 7: this training can run on none"):
        launch._sizes(config(min=5, max=7), lambda size: size == 4)


def test_the_largest_group_that_the_nodes_hold_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "living_nodes", lambda: [])
    room = {0: 2, 1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 9: 6}
    for num_bundles, size in room.items():
        monkeypatch.setattr(launch, "num_bundles", lambda bundle, nodes, num=num_bundles: num)
        assert launch._size_now([2, 4, 6], CPU) == size


def test_failures_count_since_the_last_checkpoint() -> None:
    steps = iter([10, 20, 30, 40, 50, 50, 50, 50])
    failures = launch._Failures(3, "train", lambda: next(steps))
    for _ in range(7):  # five with a checkpoint before each, and two more
        failures.add(RuntimeError("the host was terminated"))
    with pytest.raises(StageFailed, match="training workers failed: the host was terminated"):
        failures.add(RuntimeError("the host was terminated"))


def test_storage_that_is_away_does_not_end_the_run_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    def away() -> int:
        raise StorageUnavailable("the bucket is away")

    failures = launch._Failures(1, "train", away)
    failures.add(RuntimeError("killed"))
    assert "cannot look for a new checkpoint: the bucket is away" in caplog.text
    with pytest.raises(StageFailed):
        failures.add(RuntimeError("killed"))


@pytest.mark.usefixtures("embedded")
def test_a_group_gives_way_when_there_is_room_for_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Ray of three CPUs; that of the group itself is not taken."""
    from ray.util import placement_group_table

    def wait(grows: Growth) -> list[str]:
        """Until Ray has placed three of the reservations."""
        while True:
            ready = grows.is_ready()
            states = [placement_group_table(each)["state"] for each in grows._reservations]
            if states.count("CREATED") == 3:
                return [*states, str(ready or grows.is_ready())]

    with Growth(CPU, 1, [1, 2, 4]) as grows:
        assert wait(grows)[-1] == "True"  # nothing is left to come
        reservations = grows._reservations
    assert all(placement_group_table(each)["state"] == "REMOVED" for each in reservations)
    with Growth(CPU, 1, [1, 8]) as grows:
        assert wait(grows)[-1] == "False"
    with Growth(CPU, 1, [1, 2, 8]) as grows:
        assert wait(grows)[-1] == "False"  # more may come
        monkeypatch.setattr(growth, "SETTLE_SECONDS", 0.0)
        assert grows.is_ready()
    with Growth(CPU, 4, [1, 2, 4]) as grows:
        assert not grows.is_ready()
        assert not grows._reservations
