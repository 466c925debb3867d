from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from clipmill.cluster import in_order, load_jobs, preflight, server, submission, submit
from clipmill.cluster.check import NodeReport
from clipmill.cluster.jobs import submission_stem
from clipmill.cluster.server import Server
from clipmill.cluster.submission import _may_succeed_again
from clipmill.errors import StageFailed, StopRequested, UserError
from tests.cluster.head import started_head
from tests.s3.proxy import Proxy

REPOSITORY = Path(__file__).parents[2]


def write_jobs(folder: Path, jobs: list[dict[str, Any]], **keys: Any) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "jobs": jobs, **keys}))
    return path


def job(name: str, *needs: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "entrypoint": f"echo {name}", "needs": list(needs), **keys}


def test_the_stages_of_this_repository() -> None:
    jobs = load_jobs(REPOSITORY / "ray_jobs.yaml").jobs
    stages = ["shard", "train-vqvae", "tokenize", "train-prior", "sample", "evaluate", "report"]
    assert [each.name for each in in_order(jobs, ["report"])] == stages
    assert [each.entrypoint for each in jobs] == [f"clipmill {name} --config demo" for name in stages]
    jobs = load_jobs(REPOSITORY / "ray_jobs.yaml", ["a b.yaml", "c.yaml"]).jobs
    assert jobs[0].entrypoint == "clipmill shard --config 'a b.yaml' --config c.yaml"
    assert [each.name for each in in_order(jobs, ["tokenize"])] == stages[:3]


def test_needs_come_first_once_and_otherwise_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_jobs(tmp_path, [job("d", "b", "c"), job("c", "a"), job("b", "a"), job("a"), job("e")])
    jobs = load_jobs(path).jobs
    assert [each.name for each in in_order(jobs, ["e", "d"])] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([job("a", "b")], r"job 'b' \(needed by a\) is not in the jobs file; it has a"),
        ([job("a", "c"), job("b", "a"), job("c", "b")], "in a circle: a -> c -> b -> a"),
        ([job("a", "a")], "in a circle: a -> a"),
        ([job("a"), job("a")], "a named twice"),
        ([job("a", entry_point="x")], r"jobs.0.entry_point: Extra inputs are not permitted"),
        ([job("../x y")], r"jobs.0.name: String should match pattern"),
        ([job("a", metadata={"retry": 3})], r"jobs.0.metadata.retry: Input should be a valid string"),
        ([job("a", retries=-1)], r"jobs.0.retries"),
        ([job("a", runtime_env={"workdir": "."})], r"jobs.0.runtime_env.workdir: Extra inputs"),
        ([], "jobs: List should have at least 1 item"),
    ],
)
def test_mistakes_in_a_jobs_file_are_named(tmp_path: Path, jobs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_jobs(write_jobs(tmp_path, jobs))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_jobs_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_jobs(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("jobs: [")
    with pytest.raises(UserError, match=r"bad\.yaml is no YAML"):
        load_jobs(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="schema: Input should be less than or equal to 1"):
        load_jobs(write_jobs(tmp_path, [job("a")], schema=2))


def test_a_submission_is_known_by_what_runs(tmp_path: Path) -> None:
    [spec] = load_jobs(write_jobs(tmp_path, [job("shard")])).jobs
    environment = {"working_dir": str(tmp_path)}
    (tmp_path / "run.yaml").write_text("seed: 1")
    entrypoint = "clipmill shard --config run.yaml"
    stem = submission_stem(spec, environment, entrypoint)
    assert re.fullmatch(r"shard-[0-9a-f]{8}", stem)
    assert submission_stem(spec, environment, entrypoint) == stem
    assert submission_stem(spec, environment, f"{entrypoint} seed=2") != stem
    (tmp_path / "run.yaml").write_text("seed: 2")
    assert submission_stem(spec, environment, entrypoint) != stem


def test_an_unreachable_jobs_server_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Ray Jobs server answers at http://127\.0\.0\.1:1"):
        submit(write_jobs(tmp_path, [job("a")]), [], "http://127.0.0.1:1")


def test_a_driver_that_a_signal_killed_is_tried_again() -> None:
    tried_again = {code for code in (None, *range(-64, 256)) if _may_succeed_again(code)}
    assert {None, 75, -signal.SIGKILL, 128 + signal.SIGKILL, 128 + signal.SIGTERM} <= tried_again
    assert tried_again.isdisjoint({0, 1, 2, 126, 127, 128, 255})


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """URL of a Jobs server."""
    with started_head() as started:
        yield started.jobs


SCRIPT = """\
import sys
from pathlib import Path
from clipmill.cluster import fan_out, is_embedded
from clipmill.config import ClusterConfig

def make_worker(word):
    return lambda unit: {"word": f"{word} {unit}"}

if __name__ == "__main__":
    notes, mode = Path(sys.argv[1]), sys.argv[2]
    assert not is_embedded(ClusterConfig())
    fan_out(make_worker, (mode,), [1, 2, 3], config=ClusterConfig(), on_result=lambda unit, result: print(result))
    with notes.open("a") as file:
        file.write(mode + "\\n")
    sys.exit({"again": 75 if notes.read_text().count("again") == 1 else 0, "broken": 1}.get(mode, 0))
"""


@pytest.mark.slow
def test_jobs_run_in_order_are_tried_again_and_may_be_submitted_again(head: str, tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(SCRIPT)
    notes = tmp_path.parent / f"{tmp_path.name}-notes"
    run = f"{sys.executable} stage.py {notes}"
    # The package travels in the upload too, as with `ray job submit --working-dir .`
    os.symlink(REPOSITORY / "clipmill", tmp_path / "clipmill")
    jobs = [
        job("last", "again", entrypoint=f"{run} last"),
        job("again", "first", entrypoint=f"{run} again"),
        job("first", entrypoint=f"{run} first"),
        job("broken", entrypoint=f"{run} broken"),
    ]
    path = write_jobs(tmp_path, jobs, runtime_env={"working_dir": "."})
    submit(path, ["last"], head)
    assert notes.read_text().split() == ["first", "again", "again", "last"]
    submit(path, ["first"], head)
    assert notes.read_text().split()[4:] == ["first"]
    with pytest.raises(StageFailed, match=r"job broken \(broken-[0-9a-f]{8}-a1\) failed with exit status 1") as caught:
        submit(path, ["broken"], head)
    assert "{'word': 'broken 3'}" in str(caught.value)


@pytest.mark.slow
def test_a_stopped_driver_has_time_for_its_checkpoint(head: str, tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    entrypoint = f"{sys.executable} {Path(__file__).with_name('driver.py')} train {folder}"
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    path = write_jobs(tmp_path, [job("train", entrypoint=entrypoint)], runtime_env=environment)
    command = (
        "import sys; from clipmill.cluster import submit; from clipmill.errors import Interrupted\n"
        "try: submit(sys.argv[1], [], sys.argv[2])\n"
        "except Interrupted as error: print(error); sys.exit(75)"
    )
    watcher = subprocess.Popen([sys.executable, "-c", command, str(path), head], stdout=subprocess.PIPE, text=True)
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head)
    deadline = time.monotonic() + 120
    while True:
        found = [each.submission_id for each in client.list_jobs() if each.submission_id.startswith("train-")]
        if found and "at work" in client.get_job_logs(found[0]):
            break
        assert time.monotonic() < deadline
        time.sleep(0.5)
    client.stop_job(found[0])
    output, _ = watcher.communicate(timeout=120)
    assert (watcher.returncode, "was stopped; submit again to go on" in output) == (75, True)
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]


@pytest.mark.slow
def test_a_jobs_server_that_is_away_is_asked_again(head: str, tmp_path: Path) -> None:
    proxy = Proxy(int(head.rpartition(":")[2]))
    mark = tmp_path / "runs"
    path = write_jobs(tmp_path, [job("waited", entrypoint=f"echo run >> {mark}; sleep 8")])
    waiter = threading.Thread(target=submit, args=(path, [], proxy.endpoint))
    waiter.start()
    while not mark.exists():
        time.sleep(0.1)
    proxy.num_cuts = 3
    waiter.join(120)
    proxy.stop()
    assert not waiter.is_alive()
    assert proxy.num_cuts == 0
    assert mark.read_text().split() == ["run"]


SUBMITTER = """\
import sys, time
from pathlib import Path
from clipmill.cluster import submit

folder, me, other, head = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
for number in range(20):
    (folder / f"{number}-{me}").touch()
    while not (folder / f"{number}-{other}").exists():
        time.sleep(0.001)
    submit(folder / f"{number}.yaml", [], head, since=time.time())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_submits_at_the_same_instant_are_one_attempt_on_a_cluster(head: str, tmp_path: Path) -> None:
    for number in range(20):
        path = write_jobs(tmp_path, [job(f"twice-{number}", entrypoint=f"echo run >> {tmp_path}/runs-{number}")])
        path.rename(tmp_path / f"{number}.yaml")
    command = [sys.executable, "-c", SUBMITTER, str(tmp_path)]
    submitters = [
        subprocess.Popen([*command, *names, head], stderr=subprocess.PIPE, text=True)
        for names in (["a", "b"], ["b", "a"])
    ]
    for submitter in submitters:
        _, errors = submitter.communicate(timeout=800)
        assert submitter.returncode == 0, errors
    runs = [(tmp_path / f"runs-{number}").read_text().split() for number in range(20)]
    assert runs == [["run"]] * 20
    from ray.job_submission import JobSubmissionClient

    found = [
        name for each in JobSubmissionClient(head).list_jobs() if (name := each.submission_id or "")[:6] == "twice-"
    ]
    assert len(found) == 20
    assert all(name.endswith("-a1") for name in found)


class FakeClient:
    """A Jobs server whose jobs take ``seconds`` and end with the exit statuses given, one an attempt."""

    def __init__(self, *exit_codes: int, seconds: float = 0.0, log: str = "") -> None:
        self.exit_codes, self.seconds, self.log = exit_codes, seconds, log
        self.ends: dict[str, float] = {}
        self.faults: list[Exception] = []
        self.lock = threading.Lock()

    def _fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        with self.lock:
            if submission_id in self.ends:
                raise RuntimeError(f"Request failed with status code 400: Job {submission_id} already exists")
            self.ends[submission_id] = time.time() + self.seconds
        self._fail()
        return submission_id

    def get_job_info(self, submission_id: str) -> Any:
        self._fail()
        if submission_id not in self.ends:
            raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist")
        is_over = time.time() >= self.ends[submission_id]
        code = (
            self.exit_codes[min(int(submission_id.rpartition("-a")[2]), len(self.exit_codes)) - 1] if is_over else None
        )
        value = "RUNNING" if code is None else "SUCCEEDED" if code == 0 else "FAILED"
        return SimpleNamespace(
            submission_id=submission_id,
            status=SimpleNamespace(value=value, is_terminal=lambda: is_over),
            message="",
            driver_exit_code=code,
            end_time=int(self.ends[submission_id] * 1000),
        )

    def list_jobs(self) -> list[Any]:
        return [self.get_job_info(submission_id) for submission_id in list(self.ends)]

    def get_job_logs(self, submission_id: str) -> str:
        return self.log


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeClient]:
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(server, "FIRST_PAUSE_SECONDS", 0.01)

    def use(*arguments: Any, **options: Any) -> FakeClient:
        client = FakeClient(*arguments, **options)
        monkeypatch.setattr(submission, "connect", lambda address, confirm: Server(client))  # type: ignore[arg-type]
        return client

    return use


def attempts_of(client: FakeClient) -> list[str]:
    return [name.rpartition("-")[2] for name in client.ends]


def test_a_submission_whose_answer_was_lost_is_not_submitted_twice(tmp_path: Path, fake: Any) -> None:
    client = fake(0, seconds=0.2)
    client.faults = [ConnectionError("the connection was reset")]
    submit(write_jobs(tmp_path, [job("once")]), [], None)
    assert attempts_of(client) == ["a1"]


def test_a_failed_poll_is_asked_again_whatever_failed(tmp_path: Path, fake: Any) -> None:
    client = fake(0, seconds=0.2)
    submit(write_jobs(tmp_path, [job("first")]), [], None)
    client.faults = [
        ConnectionResetError("reset"),
        RuntimeError("Request failed with status code 500: Traceback"),
        RuntimeError("Request failed with status code 429: slow down"),
        KeyError("a proxy's page in place of an answer"),
    ]
    submit(write_jobs(tmp_path, [job("second")]), [], None)
    assert client.faults == []
    assert attempts_of(client) == ["a1", "a1"]


def test_two_submits_at_the_same_instant_are_one_attempt(tmp_path: Path, fake: Any) -> None:
    path = write_jobs(tmp_path, [job("a"), job("b", "a"), job("c", "b")])
    for seconds in [0.0, 0.02] * 10:
        client = fake(75, 0, seconds=seconds)
        errors: list[BaseException] = []

        def run(errors: list[BaseException] = errors) -> None:
            try:
                submit(path, [], None)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert errors == []
        assert sorted(client.ends) == sorted({*client.ends})
        assert sorted(attempts_of(client)) == ["a1"] * 3 + ["a2"] * 3


@pytest.mark.parametrize(
    ("code", "kind", "status"), [(2, UserError, 2), (76, StopRequested, 76), (1, StageFailed, 1)], ids=str
)
def test_what_another_attempt_would_not_change_is_not_tried_again(
    tmp_path: Path, fake: Any, code: int, kind: type[Exception], status: int
) -> None:
    client = fake(code, log="planned\nclipmill: no videos at s3://b/raw; name another source\n")
    with pytest.raises(kind, match="no videos at s3://b/raw; name another source") as caught:
        submit(write_jobs(tmp_path, [job("a")]), [], None)
    assert caught.value.exit_status == status  # type: ignore[attr-defined]
    assert attempts_of(client) == ["a1"]


def test_a_job_that_succeeded_before_the_call_runs_again(tmp_path: Path, fake: Any) -> None:
    client = fake(0)
    path = write_jobs(tmp_path, [job("a")])
    submit(path, [], None)
    time.sleep(0.01)
    submit(path, [], None)
    assert attempts_of(client) == ["a1", "a2"]
    submit(path, [], None, since=time.time() - 1)
    assert attempts_of(client) == ["a1", "a2"]


def test_retries_end(tmp_path: Path, fake: Any) -> None:
    client = fake(75)
    with pytest.raises(StageFailed, match="failed with exit status 75"):
        submit(write_jobs(tmp_path, [job("a", retries=2)]), [], None)
    assert attempts_of(client) == ["a1", "a2", "a3"]


def test_credentials_are_not_given_to_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "MARKER-OF-A-KEY")
    for path in (
        write_jobs(tmp_path, [job("a")], runtime_env={"env_vars": {"AWS_SECRET_ACCESS_KEY": "MARKER"}}),
        write_jobs(tmp_path, [job("a", runtime_env={"env_vars": {"AZURE_STORAGE_CONNECTION_STRING": "MARKER"}})]),
        write_jobs(tmp_path, [job("a", entrypoint="clipmill shard data.source.url=https://me:MARKER@host/list.csv")]),
        write_jobs(tmp_path, [job("a", entrypoint="echo MARKER-OF-A-KEY")]),
    ):
        with pytest.raises(UserError, match="Ray would show in its dashboard") as caught:
            load_jobs(path)
        assert "MARKER" not in str(caught.value)
    with pytest.raises(UserError, match="an assignment holds credentials"):
        submit(write_jobs(tmp_path, [job("a")]), [], None, ["data.source.url=https://me:MARKER@host/list.csv"])


OLD_NODE = NodeReport("old", {"python": "3.12.1", "torch": "2.13.0"}, None)
SICK_NODE = NodeReport("sick", {"python": "3.11.2"}, "s3://b/run: access denied (InvalidAccessKeyId)")


def stages_file(folder: Path) -> Path:
    (folder / "my.yaml").write_text(f"root: {folder}/run\ncluster: {{fanout_workers: 3, fanout_cpus: 2}}\n")
    jobs = [job("shard", entrypoint="clipmill shard"), job("sample", "shard", entrypoint="clipmill sample")]
    jobs[1]["entrypoint_num_gpus"] = 1
    return write_jobs(folder, jobs, config="my.yaml", runtime_env={"working_dir": "."})


def test_a_wrong_config_is_named_before_anything_is_submitted(tmp_path: Path, fake: Any) -> None:
    client = fake(0)
    (folder := tmp_path / "travels").mkdir()
    path = stages_file(folder)
    with pytest.raises(UserError, match=r"unknown key data\.crfs"):
        submit(path, [], None, ["data.crfs=3"])
    (tmp_path / "other.yaml").write_text("root: r")
    with pytest.raises(UserError, match=r"other.yaml is not in .*travels, which is what travels"):
        submit(path, [], None, config=[str(tmp_path / "other.yaml")])
    with pytest.raises(UserError, match=r"config file none\.yaml does not exist"):
        submit(path, [], None, config=["none.yaml"])
    assert client.ends == {}


def test_a_dry_run_shows_the_chain_and_submits_nothing(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = fake(0)
    client.get_address = lambda: "http://head:8265"
    monkeypatch.setattr(preflight, "_reports", lambda server, planned: [OLD_NODE, SICK_NODE])
    monkeypatch.setattr(preflight, "installed_versions", lambda: {"python": "3.11.2", "torch": "2.13.0"})
    monkeypatch.setattr(Server, "nodes", lambda self: [{"CPU": 8.0}, {"CPU": 3.0}])
    path = stages_file(tmp_path)
    submit(path, [], None, ["seed=3"], dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "cluster at http://head:8265: 2 nodes",
        "shard: clipmill shard --config my.yaml seed=3",
        "  state: not begun",
        "  workers: 3 x 2 CPU; the cluster holds 5 when empty",
        "sample, after shard: clipmill sample --config my.yaml seed=3",
        "  state: not begun",
        "  driver: 1 x 1 GPU; NO NODE HOLDS ONE",
        "  workers: 3 x 2 CPU; the cluster holds 5 when empty",
        "sample: no node holds 1 GPU for its driver; it will wait for one",
        "sick: s3://b/run: access denied (InvalidAccessKeyId)",
        "python is 3.11.2 here, 3.12.1 on old",
        "torch is 2.13.0 here, missing on sick",
    ]
    assert client.ends == {}


def test_the_nodes_are_asked_with_the_config_of_a_stage() -> None:
    command = "clipmill shard --config 'a b.yaml' -c c.yaml --extend root=s3://b/r data.crf=3"
    assert preflight._entrypoint(command) == (
        "clipmill check --config 'a b.yaml' -c c.yaml root=s3://b/r data.crf=3 --json"
    )


@pytest.mark.slow
def test_a_job_out_of_time_is_stopped(head: str, tmp_path: Path) -> None:
    path = write_jobs(tmp_path, [job("slow", entrypoint="sleep 600", timeout_seconds=3)])
    with pytest.raises(StageFailed, match=r"slow-[0-9a-f]{8}-a1 was stopped: \w+ after 3 s"):
        submit(path, [], head)


@pytest.mark.slow
@pytest.mark.parametrize("entrypoint", ["kill -9 $$", "sh -c 'kill -9 $$'; exit $?"], ids=["itself", "below a shell"])
def test_a_killed_driver_is_submitted_again(head: str, tmp_path: Path, entrypoint: str) -> None:
    mark = tmp_path / "killed"
    killed_once = f"test -e {mark} || {{ touch {mark}; {entrypoint}; }}"
    submit(write_jobs(tmp_path, [job("killed", entrypoint=killed_once, retries=1)]), [], head)
    mark.unlink()
    with pytest.raises(StageFailed, match=r"failed with exit status (-9|137)"):
        submit(write_jobs(tmp_path, [job("killed", entrypoint=killed_once, retries=0)]), [], head)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_stops_waiting_is_told_that_the_job_runs_on(head: str, tmp_path: Path, number: int) -> None:
    from ray.job_submission import JobSubmissionClient

    name = f"waited{number}"
    path = write_jobs(tmp_path, [job(name, entrypoint="sleep 600")])
    command = [sys.executable, "-m", "clipmill.cli", "submit", "--jobs", str(path), "--address", head]
    waiter = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert waiter.stderr is not None
    while f"job {name}-" not in (line := waiter.stderr.readline()):  # it waits from then on
        assert line
    waiter.send_signal(number)
    _, output = waiter.communicate(timeout=60)
    assert (waiter.returncode, "runs on; give the same command" in output) == (75, True)
    client = JobSubmissionClient(head)
    [found] = [each for each in client.list_jobs() if (each.submission_id or "").startswith(name)]
    assert not found.status.is_terminal()
    client.stop_job(found.submission_id)
