"""Submission to a Ray cluster: order, retries, stops, and submitters that meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipmill.cluster import submit
from clipmill.errors import StageFailed
from tests.cluster.head import started_head
from tests.cluster.jobs_file import job, write_jobs
from tests.s3.proxy import Proxy

REPOSITORY = Path(__file__).parents[2]


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
