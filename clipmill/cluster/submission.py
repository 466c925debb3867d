"""Submits the jobs of ``ray_jobs.yaml`` to a Ray cluster, in order, and brings each to its end.

Ray runs a submitted job once, so the submitter retries it: after exit status 75 (interrupted, or storage unavailable),
after a signal killed its driver, and after its supervisor was lost. Pauses grow from 10 s to 10 minutes. A user's error
(exit status 2) and a stop (76) are not retried.

Attempts are numbered, and Ray accepts each number once. If several submitters run the same job, exactly one of them
submits an attempt, and the others wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clipmill import storage
from clipmill.cluster.chain import PlannedJob, describe, plan_chain
from clipmill.cluster.connection import stop_signals
from clipmill.cluster.jobs import Job
from clipmill.cluster.pauses import pause
from clipmill.cluster.preflight import findings
from clipmill.cluster.server import Server, connect, resources_text
from clipmill.errors import Interrupted, StageFailed, StopRequested, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

__all__ = ["submit"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MENTION_SECONDS = 60.0
"""Seconds between two log lines about a job that neither starts nor ends."""
PENDING_SECONDS = 10.0
"""If a job has not begun by then, a log line says why."""
FIRST_PAUSE_SECONDS = 10.0
MAX_PAUSE_SECONDS = 600.0
PROGRESS_SECONDS = 600.0
"""After an attempt that ran this long, the count of failures restarts: it probably made progress."""
LOG_TAIL_LINES = 20


class _Ended(NamedTuple):
    """How an attempt ended: Ray's status, and the driver's exit status if it has one."""

    status: str
    exit_code: int | None


def submit(
    path: str | Path,
    names: Sequence[str],
    address: str | None,
    assignments: Sequence[str] = (),
    *,
    config: Sequence[str] = (),
    follow: bool = False,
    dry_run: bool = False,
    since: float | None = None,
    confirm: Callable[[str], bool] | None = None,
) -> None:
    """Submits the named jobs (an empty list: all jobs) and their dependencies, one after the other, and waits for each.

    If a job still runs from an earlier call, this call waits for it instead of submitting it twice. Stages skip
    finished work, so the whole chain may be submitted again at any time.

    Args:
        path: the jobs file.
        names: jobs of the file.
        address: see `clipmill.cluster.server.connect`.
        assignments: ``section.key=value``, appended to every entrypoint.
        config: replaces the ``config`` of the file.
        follow: print the log of the running job.
        dry_run: print what would be submitted, and the result of a check of the nodes; submit no stage.
        since: time of this request, seconds since the epoch; None means now. A job that succeeded after it is not
            submitted again: another submitter ran it at the same time.
        confirm: see `clipmill.cluster.server.connect`.

    Raises:
        UserError: the file is wrong, no server answers, or a job ended with exit status 2.
        StageFailed: a job failed, or has no retries or time left; the message has the end of its log.
        Interrupted: somebody stopped a job, or stopped this process (its job continues).
    """
    since = time.time() if since is None else since
    chain = plan_chain(path, names, assignments, config)
    server = connect(address, confirm)
    if dry_run:
        for line in itertools.chain(describe(chain, server), findings(server, chain)):
            print(line)
        return
    seen = _attempts(server)
    if not any(_is_running(seen.get(one.stem)) for one in chain):
        for line in findings(server, chain):
            logger.warning("%s", line)
    for one in chain:
        _run(server, one, seen.get(one.stem, (0, None)), since, follow)
        logger.info("job %s: finished", one.job.name)
        if one.stage == "report" and one.config is not None:
            logger.info("report: %s", storage.shown(one.config.folder("report", "index.html")))


# ------------------------------------------------------------------------------------------ attempts


def _attempts(server: Server) -> dict[str, tuple[int, JobDetails | None]]:
    """The newest attempt at each job that the server lists, by the stem of its id."""
    newest: dict[str, tuple[int, JobDetails | None]] = {}
    for details in server.jobs():
        stem, _, number = (details.submission_id or "").rpartition("-a")
        if number.isdigit() and int(number) > newest.get(stem, (0, None))[0]:
            newest[stem] = int(number), details
    return newest


def _run(server: Server, planned: PlannedJob, seen: tuple[int, JobDetails | None], since: float, follow: bool) -> None:
    """Runs one job to its end, with retries where they help.

    Args:
        server: of the cluster.
        planned: the job.
        seen: the newest attempt when the chain began; a later attempt comes from another submitter.
        since: time of the request for the chain.
        follow: print the job's log.
    """
    job, num_failures = planned.job, 0
    attempt = seen[0] - 1 if seen[1] is not None and _is_ours(seen[1], since) else seen[0]
    while True:
        attempt = _next_attempt(server, planned, attempt)
        submission_id, began = f"{planned.stem}-a{attempt}", time.monotonic()
        ended = _wait(server, planned, submission_id, follow)
        if ended.status == "SUCCEEDED":
            return
        if ended.status == "STOPPED":
            raise Interrupted(f"job {job.name} ({submission_id}) was stopped; submit again to go on")
        if time.monotonic() - began > PROGRESS_SECONDS:
            num_failures = 0
        num_failures += 1
        if not _may_succeed_again(ended.exit_code) or num_failures > job.retries:
            raise _failure(server, job, submission_id, ended.exit_code)
        seconds = pause(num_failures, MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS)
        logger.warning(
            "job %s ended with exit status %s: submitting it again in %.0f s (%d of %d)",
            submission_id, ended.exit_code, seconds, num_failures, job.retries,
        )  # fmt: skip
        time.sleep(seconds)


def _is_running(seen: tuple[int, JobDetails | None] | None) -> bool:
    return seen is not None and seen[1] is not None and not seen[1].status.is_terminal()


def _is_ours(details: JobDetails, since: float) -> bool:
    """Whether an attempt makes a new one unnecessary: it is running, or has succeeded since the request."""
    if not details.status.is_terminal():
        return True
    return details.status.value == "SUCCEEDED" and (details.end_time or 0) / 1000 > since


def _next_attempt(server: Server, planned: PlannedJob, after: int) -> int:
    """The number of the first attempt after ``after``: another submitter's, or else a new one."""
    newest, _ = _attempts(server).get(planned.stem, (0, None))
    if newest > after:
        return newest
    number = after + 1
    while not _submit(server, planned, f"{planned.stem}-a{number}"):
        if server.job(f"{planned.stem}-a{number}") is not None:
            return number  # another submitter was quicker
        number += 1  # the job was deleted: it is not listed, but its id stays in use
    return number


def _submit(server: Server, planned: PlannedJob, submission_id: str) -> bool:
    """Submits one attempt; False if its id is taken."""
    job = planned.job
    resources = job.model_dump(include={name for name in Job.model_fields if name.startswith("entrypoint_")})

    def request() -> bool:
        try:
            server.client.submit_job(
                entrypoint=planned.entrypoint,
                submission_id=submission_id,
                runtime_env=planned.runtime_env,
                metadata={"stage": job.name, **job.metadata},
                **resources,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            return False  # perhaps by our own earlier request, whose answer was lost
        return True

    return server.ask(request)


def _may_succeed_again(exit_code: int | None) -> bool:
    """Whether another attempt may succeed.

    It may after 75 (interrupted), after no status (the supervisor died), and after a signal, such as the kernel's when
    memory runs out. A signal is a negative status if the driver was Ray's child, and above 128 if a shell started it.
    """
    return exit_code is None or exit_code == 75 or exit_code < 0 or 128 < exit_code < 128 + signal.NSIG


def _failure(server: Server, job: Job, submission_id: str, exit_code: int | None) -> Exception:
    """The error to raise for a failed job: the same kind as the job's own, with the end of its log."""
    lines = server.log_tail(submission_id, LOG_TAIL_LINES)
    what = f"job {job.name} ({submission_id})"
    if exit_code in (UserError.exit_status, StopRequested.exit_status):
        said = next((line for line in reversed(lines) if line.startswith("clipmill: ")), lines[-1] if lines else "")
        kind = UserError if exit_code == UserError.exit_status else StopRequested
        return kind(f"{what}: {said.removeprefix('clipmill: ')}")
    tail = "\n".join(lines)
    return StageFailed(f"{what} failed with exit status {exit_code}:\n{tail}")


# -------------------------------------------------------------------------------------------- waiting


def _wait(server: Server, planned: PlannedJob, submission_id: str, follow: bool) -> _Ended:
    """Logs a job's status until it ends."""
    job, began, last = planned.job, time.monotonic(), ""
    mention_at, is_out_of_time = began + PENDING_SECONDS, False
    with stop_signals() as stop, _following(server, submission_id, follow):
        while True:
            details = server.job(submission_id, stop)
            if details is None:
                if is_out_of_time:
                    raise _out_of_time(submission_id, last, job)
                return _Ended("FAILED", None)  # the cluster was restarted and no longer knows the job
            status, now = str(details.status.value), time.monotonic()
            is_due = now > mention_at
            if status != last or is_due:
                reason = _pending_reason(server, planned) if status == "PENDING" and is_due else ""
                if status != last or reason or not follow:
                    logger.info("job %s: %s after %.0f s%s", submission_id, status, now - began, reason)
                last = status
            if is_due:
                mention_at = now + MENTION_SECONDS
            if details.status.is_terminal():
                if is_out_of_time:
                    raise _out_of_time(submission_id, status, job)
                return _Ended(status, details.driver_exit_code)
            if job.timeout_seconds is not None and now - began > job.timeout_seconds and not is_out_of_time:
                is_out_of_time = True
                server.ask(lambda: server.client.stop_job(submission_id), stop)
                logger.warning("job %s is out of time; Ray stops one that is PENDING once it begins", submission_id)
            time.sleep(POLL_SECONDS)  # not stop.wait: it holds a lock that the signal handler needs
            if stop.is_set():
                raise Interrupted(f"job {submission_id} runs on; give the same command to wait for it again")


def _out_of_time(submission_id: str, status: str, job: Job) -> StageFailed:
    return StageFailed(f"job {submission_id} was stopped: {status or 'gone'} after {job.timeout_seconds:g} s")


def _pending_reason(server: Server, planned: PlannedJob) -> str:
    """Why a job has not begun."""
    job = planned.job
    wanted = {
        "CPU": job.entrypoint_num_cpus or 0,
        "GPU": job.entrypoint_num_gpus or 0,
        "memory": job.entrypoint_memory or 0,
        **(job.entrypoint_resources or {}),
    }
    wanted = {name: amount for name, amount in wanted.items() if amount}
    nodes = server.nodes()
    if wanted and nodes and not any(all(node.get(name, 0) >= wanted[name] for name in wanted) for node in nodes):
        largest = {name: max(node.get(name, 0) for node in nodes) for name in wanted}
        return (
            f": no node has the {resources_text(wanted)} that it asks for (of {len(nodes)} the largest has "
            f"{resources_text(largest)}); it waits for one"
        )
    if wanted:
        return f": it waits for {resources_text(wanted)} to become free, or for its runtime_env"
    return ": it waits for its runtime_env (working_dir, pip), or for a node to start its supervisor"


@contextlib.contextmanager
def _following(server: Server, submission_id: str, follow: bool) -> Iterator[None]:
    """Prints a job's log during the block."""
    if not follow:
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=_follow, args=(server, submission_id, is_over), name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(2 * POLL_SECONDS)


def _follow(server: Server, submission_id: str, is_over: threading.Event) -> None:
    """Prints a log to its end, without repeats: after a lost connection the server sends it from the start again."""
    num_printed = 0

    async def tail() -> None:
        nonlocal num_printed
        num_seen = 0
        async for text in server.client.tail_job_logs(submission_id):
            fresh = text[max(0, num_printed - num_seen) :]
            num_seen += len(text)
            if fresh:
                sys.stdout.write(fresh)
                sys.stdout.flush()
                num_printed = num_seen

    while True:
        with contextlib.suppress(Exception):  # of aiohttp and of Ray; the waiting thread reports an outage
            asyncio.run(tail())
        if is_over.wait(POLL_SECONDS):
            return
