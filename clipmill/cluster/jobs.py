"""Reads ``ray_jobs.yaml`` and submits its stages, in order, to a Ray cluster.

Fields that the Ray Jobs API knows pass through under its own names; ``name``, ``needs``, ``retries`` and
``timeout_seconds`` are ours, because a job that was submitted runs once: order and retries belong to the submitter.
"""

from __future__ import annotations

import itertools
import logging
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipmill.cluster.connection import stop_signals
from clipmill.config import fingerprint
from clipmill.errors import Interrupted, StageFailed, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = ["Job", "JobsFile", "RuntimeEnv", "in_order", "load_jobs", "submission_stem", "submit"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
STATUS_SECONDS = 60
"""How often a job that neither starts nor ends is mentioned (one whose resources cannot be met stays PENDING)."""
AWAY_SECONDS = 900
"""A Jobs server that has not answered for so long is given up."""
LOG_TAIL_LINES = 20
NEWEST_SCHEMA = 1

_AWAY = re.compile(r"status code (429|502|503|504)|try again later")
"""What Ray's client says while the server, or the agent behind it, restarts."""
_UNKNOWN = "status code 404"

T = TypeVar("T")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Other characters make a job that Ray accepts and can then neither run nor stop."""


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
    """How often it is submitted again after exit status 75, or after a signal killed its driver or its supervisor."""
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """From submission to end; then the job is stopped and counts as failed."""
    submission_id: Name | None = None
    """Stem of the submission ids, ``-a<attempt>`` follows; none: ``<name>-<hash of what runs>``."""
    runtime_env: RuntimeEnv | None = None
    """None: that of the file."""
    metadata: dict[str, str] = {}
    entrypoint_num_cpus: Annotated[float, Field(ge=0)] | None = None
    entrypoint_num_gpus: Annotated[float, Field(ge=0)] | None = None
    entrypoint_memory: Annotated[int, Field(ge=0)] | None = None
    """Bytes."""
    entrypoint_resources: dict[str, float] | None = None


class JobsFile(_Fields):
    """The whole of ``ray_jobs.yaml``."""

    schema_version: Annotated[int, Field(alias="schema", ge=1, le=NEWEST_SCHEMA)]
    runtime_env: RuntimeEnv = RuntimeEnv()
    jobs: Annotated[list[Job], Field(min_length=1)]


def load_jobs(path: str | Path) -> JobsFile:
    """Reads and checks a jobs file.

    Raises:
        UserError: no such file, no YAML, an unknown key, an unknown or repeated name, a cycle.
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
    return jobs_file


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
    """``<name>-<hash8>``: what runs, including the bytes of the ``--config`` files that travel with working_dir."""
    words = shlex.split(entrypoint)
    folder = Path(runtime_env.get("working_dir") or ".")
    files = [folder / value for flag, value in itertools.pairwise(words) if flag == "--config"]
    configs = [path.read_bytes().hex() for path in files if path.is_file()]
    return job.submission_id or f"{job.name}-{fingerprint([entrypoint, runtime_env, configs])[:8]}"


def submit(path: str | Path, names: Sequence[str], address: str | None, config_arguments: Sequence[str] = ()) -> None:
    """Submits the named jobs (none: all) and what they need, one after the other, and waits for each.

    A job that still runs from an earlier call is waited for, not submitted twice. Stages skip what is finished, so
    the whole chain may be submitted again at any time.

    Args:
        path: the jobs file.
        names: jobs of the file.
        address: of the cluster's Jobs server, ``http://HOST:8265``; none: RAY_ADDRESS, else this machine's.
        config_arguments: appended to every entrypoint: ``section.key=value`` or ``--config FILE``.

    Raises:
        UserError: the file is wrong or no server answers.
        StageFailed: a job failed, was out of retries or of time; names it and the end of its log.
        Interrupted: somebody stopped a job, or this process (its job runs on).
    """
    jobs_file = load_jobs(path)
    jobs = in_order(jobs_file.jobs, names or [job.name for job in jobs_file.jobs])
    client = _client(address)
    for job in jobs:
        entrypoint = " ".join([job.entrypoint, *map(shlex.quote, config_arguments)])
        runtime_env = (job.runtime_env or jobs_file.runtime_env).model_dump(exclude_defaults=True)
        if (folder := runtime_env.get("working_dir")) and "://" not in folder:
            runtime_env["working_dir"] = str(Path(path).resolve().parent / folder)
        _run(client, job, entrypoint, runtime_env)


def _client(address: str | None) -> JobSubmissionClient:
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError("submitting jobs needs Ray: pip install 'ray[default]'") from error
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"no Ray Jobs server answers at {address or 'RAY_ADDRESS'} ({line}); pass its URL") from error
    except AuthenticationError as error:
        raise UserError(
            f"the Ray Jobs server at {address or 'RAY_ADDRESS'} wants a token: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the cluster's token file"
        ) from error


def _run(client: JobSubmissionClient, job: Job, entrypoint: str, runtime_env: dict[str, Any]) -> None:
    """Brings one job to its end, submitting it again where that helps."""
    stem = submission_stem(job, runtime_env, entrypoint)
    attempt, running = _last_attempt(client, stem)
    for remaining in range(job.retries, -1, -1):
        if not running:
            attempt = _submit_once(client, job, stem, attempt + 1, entrypoint, runtime_env)
        running = False
        submission_id = f"{stem}-a{attempt}"
        status, exit_code = _wait(client, submission_id, job.timeout_seconds)
        if status == "SUCCEEDED":
            return
        if status == "STOPPED":
            raise Interrupted(f"job {job.name} ({submission_id}) was stopped; submit again to go on")
        if not _may_succeed_again(exit_code) or not remaining:
            log = _ask(lambda: client.get_job_logs(submission_id))  # noqa: B023  called at once
            tail = "\n".join(log.splitlines()[-LOG_TAIL_LINES:])
            raise StageFailed(f"job {job.name} ({submission_id}) failed with exit status {exit_code}:\n{tail}")
        logger.warning("job %s ended with exit status %s: submitting it again", submission_id, exit_code)


def _may_succeed_again(exit_code: int | None) -> bool:
    """Whether a driver ended for a reason that another attempt may not meet.

    That is 75 (interrupted), no status (its supervisor died), or a signal, such as the kernel's when memory runs out:
    negative where the driver was Ray's own child, above 128 where a shell stood between.
    """
    return exit_code is None or exit_code == 75 or exit_code < 0 or 128 < exit_code < 128 + signal.NSIG


def _last_attempt(client: JobSubmissionClient, stem: str) -> tuple[int, bool]:
    """The highest attempt that the server lists (0: none) and whether it is still on its way."""
    attempts = [(0, False)]
    for details in _ask(client.list_jobs):
        prefix, _, number = (details.submission_id or "").rpartition("-a")
        if prefix == stem and number.isdigit():
            attempts.append((int(number), not details.status.is_terminal()))
    return max(attempts)


def _submit_once(
    client: JobSubmissionClient, job: Job, stem: str, attempt: int, entrypoint: str, runtime_env: dict[str, Any]
) -> int:
    """Submits under the first free id from ``attempt`` on: a deleted job is not listed, but its id stays used."""
    resources = job.model_dump(include={name for name in Job.model_fields if name.startswith("entrypoint_")})
    num_requests = 0

    def request() -> bool:
        nonlocal num_requests
        num_requests += 1
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{stem}-a{attempt}",
                runtime_env=runtime_env,
                metadata={"stage": job.name, **job.metadata},
                **resources,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            return num_requests > 1  # then it is ours: only the answer to an earlier request was lost
        return True

    while not _ask(request):
        attempt, num_requests = attempt + 1, 0
    return attempt


def _wait(client: JobSubmissionClient, submission_id: str, timeout_seconds: float | None) -> tuple[str, int | None]:
    """Logs a job's status until it ends; returns the status and the driver's exit status."""
    began = mentioned = time.monotonic()
    last = ""
    with stop_signals() as stop:
        while True:
            try:
                details = _ask(lambda: client.get_job_info(submission_id), stop)
            except RuntimeError as error:
                if _UNKNOWN not in str(error):
                    raise
                return "FAILED", None  # the cluster was started anew, and has forgotten it
            status, now = str(details.status.value), time.monotonic()
            if status != last or now - mentioned > STATUS_SECONDS:
                logger.info("job %s: %s after %.0f s (%s)", submission_id, status, now - began, details.message or "-")
                last, mentioned = status, now
            if details.status.is_terminal():
                return status, details.driver_exit_code
            if timeout_seconds is not None and now - began > timeout_seconds:
                _ask(lambda: client.stop_job(submission_id), stop)
                raise StageFailed(f"job {submission_id} was stopped: {status} after {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)  # not stop.wait: the handler would wait for a lock that its own thread holds
            if stop.is_set():
                raise Interrupted(f"job {submission_id} runs on; give the same command to wait for it again")


def _ask(question: Callable[[], T], stop: threading.Event | None = None) -> T:
    """The Jobs server's answer. It may be away for a while: its node restarts, or the network is cut.

    Args:
        question: calls the server; it must be safe to repeat.
        stop: set by a signal, while there is a handler.

    Raises:
        RuntimeError: the server refuses.
        Interrupted: it was away for `AWAY_SECONDS`, or a signal came meanwhile.
    """
    began = mentioned = 0.0
    while True:
        try:
            return question()
        except (OSError, RuntimeError) as error:  # those of requests are OSErrors
            if isinstance(error, RuntimeError) and not _AWAY.search(str(error)):
                raise
            line = str(error).strip().splitlines()[0]
        now = time.monotonic()
        began = began or now
        if now - began > AWAY_SECONDS or (stop is not None and stop.is_set()):
            raise Interrupted(
                f"the Ray Jobs server has not answered for {now - began:.0f} s ({line}); what was submitted runs on, "
                "give the same command to wait for it again"
            )
        if not mentioned or now - mentioned > STATUS_SECONDS:
            logger.warning("the Ray Jobs server does not answer (%s); asking again", line)
            mentioned = now
        time.sleep(POLL_SECONDS)
