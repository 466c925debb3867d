"""The stages with root and sources in a bucket, as users run them: one process a stage, its own embedded Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clipmill import storage
from clipmill.storage import retries
from tests.pipeline.corpus import run_config, write_corpus
from tests.s3.gateway import Gateway
from tests.s3.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).parents[2]
STAGE_SECONDS = 600
"""How long a stage may take; on a busy machine the start of its Ray alone takes minutes."""
NUM_VIDEOS = 27
"""Twenty-four good ones, two that fail, one that is too short."""


@pytest.fixture
def source(bucket_url: str, tmp_path: Path) -> str:
    """The corpus of the pipeline's tests, in the bucket."""
    write_corpus(tmp_path / "raw", videos_per_class=6)
    for entry in storage.walk(str(tmp_path / "raw")):
        storage.publish_file(tmp_path / "raw" / entry.name, f"{bucket_url}/raw/{entry.name}")
    return f"{bucket_url}/raw"


def stage(name: str, root: str, source: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts a stage on a root in the bucket."""
    document = run_config(Path("unused"), Path("unused")).model_dump(mode="json", exclude_unset=True)
    document["root"], document["data"]["source"]["url"] = root, source
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(document))
    return subprocess.Popen(
        [sys.executable, "-m", "clipmill.cli", name, "--config", str(config)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, standard output, and what it said at the end of its errors."""
    try:
        output, errors = process.communicate(timeout=STAGE_SECONDS)
    finally:
        process.kill()  # a stage that hangs must not outlive its test
    return process.returncode, output, errors


def shard(root: str, source: str, folder: Path, **environment: str) -> dict:
    """The summary of a run that has to succeed."""
    status, output, errors = finish(stage("shard", root, source, folder, **environment))
    assert status == 0, errors
    return json.loads(output) if output.strip() else {}


def clips_of(root: str) -> dict[str, bytes]:
    """Every object of the data set, without what each attempt writes about itself."""
    attempts = ("_lease/", "logs/", "status.json", "summary.json", "config.yaml")
    names = [entry.name for entry in storage.walk(f"{root}/clips")]
    kept = [name for name in names if not name.startswith(attempts)]
    return {name: storage.read_bytes(f"{root}/clips/{name}") for name in kept}


def wait_for_commits(root: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + STAGE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = [e for split in ("train", "val") for e in storage.list_folder(f"{root}/clips/{split}/commits")]
        if len(found) >= count:
            return
        time.sleep(0.05)
    status = process.poll()
    process.kill()
    raise AssertionError(f"no {count} commits: exit status {status}")


def test_killed_drivers_leave_nothing_but_time_behind(bucket_url: str, source: str, tmp_path: Path) -> None:
    summary = shard(f"{bucket_url}/whole", source, tmp_path)
    assert (summary["videos"], summary["failed"], summary["short"]) == (NUM_VIDEOS, 2, 1)
    whole = clips_of(f"{bucket_url}/whole")

    root = f"{bucket_url}/killed"
    for num_commits in (1, 3, 6):
        driver = stage("shard", root, source, tmp_path)
        wait_for_commits(root, num_commits, driver)
        driver.kill()
        finish(driver)
        assert not storage.exists(f"{root}/clips/train/manifest.json")
    shard(root, source, tmp_path)
    assert clips_of(root) == whole

    verify = [sys.executable, "-m", "clipmill.cli", "verify", "--deep", root]
    done = subprocess.run(verify, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, text=True)
    assert done.returncode == 0
    status, output, errors = finish(stage("shard", root, source, tmp_path))
    assert (status, output) == (0, ""), errors


def test_a_server_that_fails_and_comes_back_costs_nothing(
    bucket_url: str, source: str, gateway: Gateway, tmp_path: Path
) -> None:
    shard(f"{bucket_url}/whole", source, tmp_path)
    root = f"{bucket_url}/outage"
    driver = stage("shard", root, source, tmp_path)
    wait_for_commits(root, 2, driver)
    gateway.kill()
    time.sleep(5)
    gateway.serve()
    status, _, errors = finish(driver)
    assert status == 0, errors
    assert clips_of(root) == clips_of(f"{bucket_url}/whole")


def test_a_server_that_stays_away_is_one_line_and_a_later_run_goes_on(
    bucket_url: str, source: str, gateway: Gateway, tmp_path: Path
) -> None:
    root = f"{bucket_url}/outage"
    driver = stage("shard", root, source, tmp_path, **{retries.RETRY_SECONDS_VARIABLE: "4"})
    wait_for_commits(root, 2, driver)
    gateway.kill()
    try:
        status, output, errors = finish(driver)
    finally:
        gateway.serve()
    assert (status, output) == (75, ""), errors
    last = errors.splitlines()[-1]
    assert last.startswith("clipmill: s3://")
    assert "did not recover within 4 s" in last
    assert "Traceback" not in errors
    assert not storage.exists(f"{root}/clips/train/manifest.json")
    shard(root, source, tmp_path)
    shard(f"{bucket_url}/whole", source, tmp_path)
    assert clips_of(root) == clips_of(f"{bucket_url}/whole")


def test_a_slow_line_with_cuts_is_survived(bucket_url: str, source: str, proxy: Proxy, tmp_path: Path) -> None:
    shard(f"{bucket_url}/whole", source, tmp_path)
    root = f"{bucket_url}/slow"
    proxy.bytes_per_second = 200_000
    proxy.num_cuts, proxy.cut_after_bytes = 10, 3000
    shard(root, source, tmp_path, AWS_ENDPOINT_URL=proxy.endpoint)
    assert proxy.num_cuts < 10
    assert clips_of(root) == clips_of(f"{bucket_url}/whole")


@pytest.mark.parametrize(
    ("environment", "bucket_name", "says"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "access denied"),
        ({}, "no-such-bucket", "the bucket no-such-bucket of s3://no-such-bucket/run"),
        ({"AWS_ENDPOINT_URL": "not an address"}, None, "AWS_ENDPOINT_URL"),
    ],
    ids=["credentials", "bucket", "endpoint"],
)
def test_what_the_user_can_fix(
    bucket_url: str, source: str, tmp_path: Path, environment: dict[str, str], bucket_name: str | None, says: str
) -> None:
    root = f"s3://{bucket_name}/run" if bucket_name else f"{bucket_url}/run"
    status, output, errors = finish(stage("shard", root, source, tmp_path, **environment))
    assert (status, output) == (2, ""), errors
    line = errors.splitlines()[-1]
    assert line.startswith("clipmill: ")
    assert says in line
    assert "Traceback" not in errors
    assert list(storage.walk(f"{bucket_url}/run")) == []
