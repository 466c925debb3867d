"""Stages as jobs of a real Ray cluster, source and root on two servers with different keys: no key is left anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.head import Head, started_head
from tests.pipeline.corpus import run_config, write_corpus
from tests.storage.s3_server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "MARKER-ROOT-SECRET",
    "AWS_SESSION_TOKEN": "MARKER-ROOT-TOKEN",
    "RAW_AWS_SECRET_ACCESS_KEY": "MARKER-RAW-SECRET",
}
KEYS = {"AWS_ACCESS_KEY_ID": "MARKER-ROOT-KEY", "RAW_AWS_ACCESS_KEY_ID": "MARKER-RAW-KEY"}


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[S3Server, S3Server]]:
    """The root's server, and the source's with its videos."""
    root, raw = S3Server(), S3Server()
    root.access_key, raw.access_key = KEYS["AWS_ACCESS_KEY_ID"], KEYS["RAW_AWS_ACCESS_KEY_ID"]
    write_corpus(tmp_path / "raw", videos_per_class=2)
    for path in (tmp_path / "raw").rglob("*.mp4"):
        raw.objects[str(path.relative_to(tmp_path))] = path.read_bytes()
    yield root, raw
    root.stop()
    raw.stop()


def environment_of(root: S3Server) -> dict[str, str]:
    """What nodes and submitters have in their environment."""
    return {
        "AWS_ENDPOINT_URL": root.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1,127.0.0.2",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **KEYS,
        **SECRETS,
    }


def write_jobs(folder: Path, raw: S3Server) -> Path:
    config = run_config(Path("unused"), Path("unused")).model_dump(mode="json", exclude_unset=True)
    config |= {
        "root": "s3://runs/one",
        "storage": [{"url": "s3://raw-videos", "endpoint_url": raw.endpoint, "credentials": "RAW_"}],
    }
    config["data"]["source"]["url"] = "s3://raw-videos/raw"
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    jobs = [{"name": "shard", "entrypoint": "clipmill shard"}]
    path = folder / "jobs.yaml"
    path.write_text(
        yaml.safe_dump({"schema": 1, "config": "my.yaml", "runtime_env": {"working_dir": "."}, "jobs": jobs})
    )
    return path


def left_behind(head: Head, root: S3Server, raw: S3Server, said: str) -> list[str]:
    """Names of whatever holds one of the markers."""
    from ray.job_submission import JobSubmissionClient

    texts = {"what submit said": said.encode()}
    client = JobSubmissionClient(head.jobs)
    for job in client.list_jobs():
        texts[f"record of {job.submission_id}"] = str(job).encode()
        texts[f"log of {job.submission_id}"] = client.get_job_logs(job.submission_id or "").encode()
    texts |= {f"object {name}": content for name, content in root.objects.items()}
    texts |= {f"file {path}": path.read_bytes() for path in head.folder.rglob("*") if path.is_file()}
    assert {name.partition(" ")[0] for name in texts} == {"what", "record", "log", "object", "file"}
    assert not any(name.startswith("one/") for name in raw.objects), "the root's objects lie with the source"
    return [name for name, content in texts.items() if b"MARKER" in content]


def test_two_servers_with_different_keys_and_no_key_left_anywhere(
    servers: tuple[S3Server, S3Server], tmp_path: Path
) -> None:
    root, raw = servers
    (folder := tmp_path / "travels").mkdir()
    jobs = write_jobs(folder, raw)
    environment = environment_of(root)
    with started_head(**environment) as head:
        done = subprocess.run(
            [sys.executable, "-m", "clipmill.cli", "submit", "--jobs", str(jobs), "--address", head.jobs, "--follow"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert {"one/clips/summary.json", "one/clips/config.yaml", "one/clips/train/manifest.json"} <= set(root.objects)
        assert raw.requests["LIST"] > 0
        assert left_behind(head, root, raw, done.stdout + done.stderr) == []
