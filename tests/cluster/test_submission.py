"""Submission: retries, lost answers and checks before the first job, with a Jobs server in memory."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clipmill.cluster import preflight, server, submission, submit
from clipmill.cluster.check import NodeReport
from clipmill.cluster.server import Server
from clipmill.cluster.submission import _may_succeed_again
from clipmill.errors import StageFailed, StopRequested, UserError
from tests.cluster.jobs_file import job, write_jobs

OLD_NODE = NodeReport("old", {"python": "3.12.1", "torch": "2.13.0"}, None)
SICK_NODE = NodeReport("sick", {"python": "3.11.2"}, "s3://b/run: access denied (InvalidAccessKeyId)")


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


def test_an_unreachable_jobs_server_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Ray Jobs server answers at http://127\.0\.0\.1:1"):
        submit(write_jobs(tmp_path, [job("a")]), [], "http://127.0.0.1:1")


def test_a_driver_that_a_signal_killed_is_tried_again() -> None:
    tried_again = {code for code in (None, *range(-64, 256)) if _may_succeed_again(code)}
    assert {None, 75, -signal.SIGKILL, 128 + signal.SIGKILL, 128 + signal.SIGTERM} <= tried_again
    assert tried_again.isdisjoint({0, 1, 2, 126, 127, 128, 255})


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
