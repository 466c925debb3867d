"""A training on Ray goes on after any death, and its curve does not show it: of a rank, a host, the driver, and in the
middle of an upload.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from clipmill.training.checkpoint import newest
from tests.cluster.hosts import Hosts, environment
from tests.training.processes import run, wait_for
from tests.training.toy import CHECKPOINT_EVERY, STEPS, read_losses, stage_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Large enough for the upload of a checkpoint to take a while: it is to be cut.
MODEL = ["prior.model.hidden_dim=192", "prior.model.num_layers=4"]
KEEP_ALL = f"prior.training.keep_every={CHECKPOINT_EVERY}"


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of the same training on two ranks that nothing happens to, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(stage_command(workspace, folder / "root", "train-prior", 1, *MODEL), folder / "log.txt", 2)
    losses = read_losses(folder / "root" / "prior")
    assert len(set(losses.values())) > STEPS // 2, "a loss that does not move proves nothing"
    return losses


class Training:
    """The stage on two workers of a Ray, as its user starts it.

    Attributes:
        folder: of the training.
        log: what all its drivers say.
        driver: the newest of them.
    """

    def __init__(self, workspace: Path, root: Path, address: str | None = None, *more: str) -> None:
        self.folder, self.log = root / "prior", root.with_name("log.txt")
        place = ["num_cpus=2"] if address is None else [f"address={address}"]
        workers = [f"cluster.{setting}" for setting in ("training_workers=2", "training_cpus=1", *place)]
        launcher = "cluster.training_launcher=ray"
        stage = stage_command(workspace, root, "train-prior", 1, *MODEL, KEEP_ALL, launcher, *workers, *more)
        self._command = [sys.executable, "-m", "clipmill.cli", *stage]
        self.start()

    def start(self) -> None:
        """Starts the driver, the same way each time."""
        with self.log.open("ab") as output:
            self.driver = subprocess.Popen(self._command, stdout=output, stderr=output, env=environment())

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Looks again and again, as long as the driver lives."""
        wait_for(condition, self.driver, self.log)

    def wait_for_commit(self) -> None:
        """Until there is a checkpoint to go on from."""
        self.wait_for(lambda: list(self.folder.glob("checkpoints/*/*/COMMITTED")))

    def finish(self) -> None:
        """Lets it end, which it must do well."""
        assert self.driver.wait(timeout=600) == 0, self.log.read_text()[-3000:]

    def check(self, undisturbed: dict[int, float], *attempts: str) -> int:
        """Whether these attempts, the last from the newest commit of the first on, make the undisturbed curve.

        Returns:
            The step from which the last went on.
        """
        assert sorted(path.stem for path in self.folder.glob("metrics/*")) == list(attempts)
        resumed = self.folder / "metrics" / f"{attempts[-1]}.jsonl"
        begun = min(json.loads(line)["step"] for line in resumed.read_text().splitlines()) - 1
        committed = [int(path.parts[-3][5:]) for path in self.folder.glob(f"checkpoints/*/{attempts[0]}/COMMITTED")]
        assert begun == max(committed), "more was lost than what came after the last commit"
        assert begun < STEPS, "nothing was left to be disturbed"
        assert read_losses(self.folder) == undisturbed, "the curve has a hole or another loss"
        return begun


@pytest.fixture
def trainings() -> Iterator[list[Training]]:
    """Trainings that a test appends; whatever happens, their drivers do not outlive it."""
    started: list[Training] = []
    yield started
    for training in started:
        training.driver.kill()
        training.driver.wait()


def workers(family: list[psutil.Process]) -> list[psutil.Process]:
    """The training workers among some processes."""
    found = []
    for process in family:
        try:
            if process.cmdline()[:1] and "RayTrainWorker" in process.cmdline()[0]:
                found.append(process)
        except psutil.Error:  # ended meanwhile
            continue
    return found


def ranks(training: Training) -> list[psutil.Process]:
    """Both ranks of a training on an embedded Ray, once they have begun."""
    found: list[psutil.Process] = []

    def begun() -> bool:
        found[:] = workers(psutil.Process(training.driver.pid).children(recursive=True))
        return len(found) == 2

    training.wait_for(begun)
    return found


@pytest.mark.ci
def test_a_killed_rank_is_replaced(workspace, tmp_path, undisturbed, trainings):
    never = "prior.training.resume=never"  # from a run before this one
    trainings.append(training := Training(workspace, tmp_path / "root", None, never))
    rank, _ = ranks(training)
    training.wait_for_commit()
    rank.kill()
    training.finish()
    training.check(undisturbed, "000001-0000", "000001-0001")


def test_a_cut_upload_is_no_checkpoint(workspace, tmp_path, undisturbed, trainings):
    trainings.append(training := Training(workspace, tmp_path / "root"))
    both = ranks(training)
    cut = training.folder / "checkpoints" / f"step-{2 * CHECKPOINT_EVERY:08d}" / "000001-0000"
    training.wait_for(lambda: list(cut.glob("state/*_states.pt")))
    for rank in both:
        rank.kill()
    left = {path.name for path in cut.rglob("*.pt")}
    assert 0 < len(left) < 3, "not in the middle of the upload"
    saved = newest(str(training.folder))
    assert saved is not None
    assert saved.step == CHECKPOINT_EVERY
    training.finish()
    assert training.check(undisturbed, "000001-0000", "000001-0001") == CHECKPOINT_EVERY


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A cluster of two hosts."""
    hosts = Hosts(2)
    yield hosts
    hosts.stop()


def test_the_same_command_goes_on_after_a_killed_driver(workspace, tmp_path, undisturbed, trainings, hosts):
    trainings.append(training := Training(workspace, tmp_path / "root", hosts.address))
    training.wait_for_commit()
    training.driver.kill()
    assert training.driver.wait() == -9
    training.start()  # while the workers of the first are perhaps still there
    training.finish()
    training.check(undisturbed, "000001-0000", "000002-0000")


def test_another_host_replaces_a_killed_one(workspace, tmp_path, undisturbed, trainings, hosts):
    trainings.append(training := Training(workspace, tmp_path / "root", hosts.address))
    training.wait_for_commit()
    assert workers(hosts.processes(hosts.newest)), "nothing of the training ran there"
    hosts.kill(hosts.newest)
    training.wait_for(lambda: "2 worker(s) of 1 CPU have not started" in training.log.read_text())
    hosts.add()
    training.finish()
    training.check(undisturbed, "000001-0000", "000001-0001")
    assert list(training.folder.glob("checkpoints/*/*/node-1.done"))


def test_a_training_that_waits_for_a_host_can_be_stopped(workspace, tmp_path, undisturbed, trainings, hosts):
    trainings.append(training := Training(workspace, tmp_path / "root", hosts.address))
    training.wait_for_commit()
    hosts.kill(hosts.newest)
    training.driver.terminate()
    assert training.driver.wait(timeout=200) == 75, training.log.read_text()[-3000:]
    assert "stopped while a node was missing" in training.log.read_text()
    hosts.add()
    training.start()
    training.finish()
    training.check(undisturbed, "000001-0000", "000002-0000")
