"""Checks of `clipmill submit` before the first stage: of the nodes, by `clipmill check` as a job, and of resources."""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import time
import uuid
from collections.abc import Iterator, Sequence

from clipmill.cluster.chain import PlannedJob, unmet_requests
from clipmill.cluster.check import NodeReport, differences, problems
from clipmill.cluster.server import Server
from clipmill.errors import UserError
from clipmill.extras import installed_versions

__all__ = ["findings"]

CHECK_SECONDS = 180.0
"""A longer check is given up: its runtime environment is still being installed, or the cluster is full."""
POLL_SECONDS = 0.5
NOT_THERE = (126, 127)
"""Exit statuses of a shell that cannot find or run a program."""

logger = logging.getLogger(__name__)


def findings(server: Server, chain: Sequence[PlannedJob]) -> Iterator[str]:
    """A line for each problem that does not prevent the chain from running.

    Raises:
        UserError: no node can run stages.
    """
    yield from unmet_requests(chain, server.nodes())
    first = next((planned for planned in chain if planned.stage is not None), None)
    if first is None:
        return
    reports = _reports(server, first)
    if reports is None:
        yield f"the check of the nodes has not ended after {CHECK_SECONDS:.0f} s; going on without it"
        return
    yield from problems(reports)
    yield from differences(reports, installed_versions())


def _reports(server: Server, planned: PlannedJob) -> list[NodeReport] | None:
    """Reports of the nodes, with the config and runtime environment of a stage; None if they take too long."""
    submission_id, began = f"check-{uuid.uuid4().hex[:8]}", time.monotonic()
    server.ask(
        lambda: server.client.submit_job(
            entrypoint=_entrypoint(planned.entrypoint),
            submission_id=submission_id,
            runtime_env=planned.runtime_env,
            metadata={"stage": "check"},
        )
    )
    while True:
        details = server.job(submission_id)
        if details is None or details.status.is_terminal():
            break
        if time.monotonic() - began > CHECK_SECONDS:
            server.ask(lambda: server.client.stop_job(submission_id))
            return None
        time.sleep(POLL_SECONDS)
    lines = server.log_tail(submission_id, 20)
    exit_code = details.driver_exit_code if details is not None else None
    reports = _parsed(lines)
    said = next((line for line in reversed(lines) if line.startswith("clipmill: ")), lines[-1] if lines else "no log")
    if exit_code == UserError.exit_status or exit_code in NOT_THERE:
        raise UserError(f"the cluster cannot run this: {said.removeprefix('clipmill: ')}")
    if reports is None:
        logger.warning("the check of the nodes failed (%s); going on without it", said)
    return reports or []


def _entrypoint(entrypoint: str) -> str:
    """``clipmill check`` with the configs and assignments of a stage's command."""
    words, kept = shlex.split(entrypoint), ["clipmill", "check"]
    for before, word in itertools.pairwise(words[1:]):
        if before in ("--config", "-c"):
            kept += [before, word]
        elif "=" in word and not word.startswith("-"):
            kept.append(word)
    return shlex.join([*kept, "--json"])


def _parsed(lines: Sequence[str]) -> list[NodeReport] | None:
    for line in reversed(lines):
        if line.startswith("[{"):
            return [NodeReport(**report) for report in json.loads(line)]
    return None
