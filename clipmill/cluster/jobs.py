"""Reads ``ray_jobs.yaml``: the stages of a run as jobs of a Ray cluster.

Fields that the Ray Jobs API knows pass through under its own names; ``config``, ``name``, ``needs``, ``retries`` and
``timeout_seconds`` are ours. Ray runs a submitted job exactly once, so order and retries are up to the submitter.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipmill import storage
from clipmill.config import fingerprint
from clipmill.errors import UserError

__all__ = ["Job", "JobsFile", "RuntimeEnv", "in_order", "load_jobs", "submission_stem"]

NEWEST_SCHEMA = 1

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""With other characters, Ray accepts a job but can then neither run nor stop it."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuntimeEnv(_Fields):
    """What Ray prepares for a job on every node (fields of Ray's ``runtime_env``)."""

    working_dir: str | None = None
    """Folder that is uploaded (100 MiB at most) or a zip's URL; relative to the jobs file."""
    excludes: list[str] = []
    env_vars: dict[str, str] = {}
    py_modules: list[str] | None = None
    pip: list[str] | dict[str, Any] | None = None
    uv: list[str] | dict[str, Any] | None = None
    conda: str | dict[str, Any] | None = None
    image_uri: str | None = None
    config: dict[str, Any] | None = None


class Job(_Fields):
    """One stage as a Ray job."""

    name: Name
    entrypoint: Annotated[str, Field(min_length=1)]
    needs: list[str] = []
    """Names of the jobs that must have succeeded before."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Number of retries (`clipmill.cluster.submission`). The count restarts after an attempt of ten minutes."""
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """Time limit from submission to end; beyond it the job is stopped and counts as failed."""
    submission_id: Name | None = None
    """Stem of the submission ids, followed by ``-a<attempt>``; None uses ``<name>-<hash of what runs>``."""
    runtime_env: RuntimeEnv | None = None
    """None uses the one of the jobs file."""
    metadata: dict[str, str] = {}
    entrypoint_num_cpus: Annotated[float, Field(ge=0)] | None = None
    entrypoint_num_gpus: Annotated[float, Field(ge=0)] | None = None
    entrypoint_memory: Annotated[int, Field(ge=0)] | None = None
    """Bytes."""
    entrypoint_resources: dict[str, float] | None = None


class JobsFile(_Fields):
    """The whole of ``ray_jobs.yaml``."""

    schema_version: Annotated[int, Field(alias="schema", ge=1, le=NEWEST_SCHEMA)]
    config: str | list[str] | None = None
    """``--config`` of every entrypoint that begins with ``clipmill``: a shipped name, or a file in working_dir."""
    runtime_env: RuntimeEnv = RuntimeEnv()
    jobs: Annotated[list[Job], Field(min_length=1)]


def load_jobs(path: str | Path, config: Sequence[str] = ()) -> JobsFile:
    """Reads and checks a jobs file; the entrypoints of the result name their config.

    Args:
        path: of the file.
        config: replaces its ``config``.

    Raises:
        UserError: no such file, no YAML, an unknown key, an unknown or repeated name, a cycle, or credentials in it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
        jobs_file = JobsFile.model_validate(content)
    except OSError as error:
        raise UserError(f"jobs file {path}: {error.strerror}; name a file like ray_jobs.yaml") from error
    except yaml.YAMLError as error:
        raise UserError(f"jobs file {path} is no YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise UserError(f"jobs file {path}: {'; '.join(problems)}") from error
    names = [job.name for job in jobs_file.jobs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"jobs file {path}: {', '.join(repeated)} named twice; give each job its own name")
    in_order(jobs_file.jobs, names)
    _refuse_credentials(path, jobs_file)
    recorded = [jobs_file.config] if isinstance(jobs_file.config, str) else jobs_file.config or []
    options = " ".join(f"--config {shlex.quote(file)}" for file in config or recorded)
    jobs = [
        job.model_copy(update={"entrypoint": f"{job.entrypoint} {options}"})
        if options and job.entrypoint.startswith("clipmill ")
        else job
        for job in jobs_file.jobs
    ]
    return jobs_file.model_copy(update={"jobs": jobs})


def _refuse_credentials(path: str | Path, jobs_file: JobsFile) -> None:
    """Ray shows a job's entrypoint and environment in clear text: in its dashboard, its API and its logs."""
    environments = [jobs_file.runtime_env, *(job.runtime_env for job in jobs_file.jobs if job.runtime_env)]
    names = sorted({name for environment in environments for name in environment.env_vars})
    if secret := [name for name in names if storage.is_secret_variable(name)]:
        raise UserError(
            f"jobs file {path}: env_vars holds {', '.join(secret)}, which Ray would show in its dashboard and logs; "
            "give it to the nodes (instance role, Kubernetes secret, environment of `ray start`) and remove it here"
        )
    for job in jobs_file.jobs:
        if storage.redacted(job.entrypoint) != job.entrypoint:
            raise UserError(
                f"jobs file {path}: the entrypoint of {job.name} holds credentials, which Ray would show in its "
                "dashboard and logs; give them to the nodes instead"
            )


def in_order(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The named jobs and all they need, each after what it needs, otherwise in the order of the file.

    Raises:
        UserError: a name is unknown, or jobs need each other in a circle.
    """
    by_name = {job.name: job for job in jobs}
    ordered: dict[str, Job] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name not in by_name:
            asked = f"needed by {path[-1]}" if path else "asked for"
            raise UserError(f"job {name!r} ({asked}) is not in the jobs file; it has {', '.join(by_name)}")
        if name in path:
            raise UserError(f"jobs need each other in a circle: {' -> '.join((*path, name))}; remove one `needs`")
        if name in ordered:
            return
        for needed in by_name[name].needs:
            visit(needed, (*path, name))
        ordered[name] = by_name[name]

    position = {name: index for index, name in enumerate(by_name)}
    for name in sorted(names, key=lambda name: position.get(name, -1)):
        visit(name, ())
    return list(ordered.values())


def submission_stem(job: Job, runtime_env: dict[str, Any], entrypoint: str) -> str:
    """``<name>-<hash8>``; the hash covers all that runs, with the bytes of ``--config`` files in working_dir."""
    words = shlex.split(entrypoint)
    folder = Path(runtime_env.get("working_dir") or ".")
    files = [folder / value for flag, value in itertools.pairwise(words) if flag == "--config"]
    configs = [path.read_bytes().hex() for path in files if path.is_file()]
    return job.submission_id or f"{job.name}-{fingerprint([entrypoint, runtime_env, configs])[:8]}"
