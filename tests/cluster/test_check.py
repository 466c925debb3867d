"""`clipmill check` and `clipmill submit --dry-run` against a real head."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from clipmill.cluster import submit
from clipmill.cluster.server import connect
from clipmill.errors import UserError
from tests.cluster.head import Head, started_head
from tests.storage.s3_server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    server.access_key = "key"
    yield server
    server.stop()


@pytest.fixture(scope="module")
def head(server: S3Server) -> Iterator[Head]:
    variables = {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "OTHER_AWS_ACCESS_KEY_ID": "unknown-key",
        "OTHER_AWS_SECRET_ACCESS_KEY": "secret",
        "NO_PROXY": "127.0.0.1,127.0.0.2",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with started_head(**variables) as started:
        jobs = connect(started.jobs)
        while not jobs.nodes():  # its agent takes a while
            time.sleep(0.5)
        yield started


def stage_jobs(folder: Path, **config: object) -> Path:
    (folder / "my.yaml").write_text(yaml.safe_dump({"root": "s3://runs/one", **config}))
    document = {
        "schema": 1,
        "config": "my.yaml",
        "runtime_env": {"working_dir": "."},
        "jobs": [{"name": "shard", "entrypoint": "clipmill shard", "entrypoint_num_gpus": 1}],
    }
    (path := folder / "jobs.yaml").write_text(yaml.safe_dump(document))
    return path


def test_a_dry_run_looks_at_the_nodes_and_leaves_nothing(
    head: Head, server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.requests.clear()
    submit(stage_jobs(tmp_path), [], head.jobs, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "shard: no node holds 1 GPU for its driver; it will wait for one", lines
    assert sum(count for request, count in server.requests.items() if request.startswith("PUT one/probe-")) >= 3
    assert server.objects == {}
    from ray.job_submission import JobSubmissionClient

    assert [(job.submission_id or "")[:6] for job in JobSubmissionClient(head.jobs).list_jobs()] == ["check-"]


def test_a_root_that_no_node_can_write_to_ends_the_submission(head: Head, tmp_path: Path) -> None:
    path = stage_jobs(tmp_path, storage=[{"url": "s3://runs", "credentials": "OTHER_"}])
    with pytest.raises(UserError, match=r"cannot run this: s3://runs/one/probe-.*access denied \(InvalidAccessKeyId\)"):
        submit(path, [], head.jobs)


def test_a_node_without_clipmill_is_named(head: Head, tmp_path: Path) -> None:
    path = stage_jobs(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["runtime_env"]["env_vars"] = {"PATH": "/usr/bin:/bin"}
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=r"the cluster cannot run this: .*clipmill.*not found"):
        submit(path, [], head.jobs)


def test_check_prints_what_each_node_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clipmill.cli", "check", f"root={tmp_path / 'run'}", "cluster.num_cpus=1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [report] = json.loads(done.stdout)
    assert (report["problem"], report["versions"]["python"]) == (None, sys.version.split()[0])
    assert list((tmp_path / "run").iterdir()) == []
