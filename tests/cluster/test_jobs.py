"""The jobs file: what is read, in which order jobs run, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from clipmill.cluster import in_order, load_jobs, submit
from clipmill.cluster.jobs import submission_stem
from clipmill.errors import UserError
from tests.cluster.jobs_file import job, write_jobs

REPOSITORY = Path(__file__).parents[2]


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
