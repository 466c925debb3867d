"""A client of a Ray cluster's Jobs server that tolerates outages of the server while jobs run for days.

A request without an answer is retried, with growing pauses, for 15 minutes. Jobs on the cluster keep running.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from clipmill.cluster.pauses import pause
from clipmill.errors import Interrupted, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

__all__ = ["Server", "connect"]

logger = logging.getLogger(__name__)

AWAY_SECONDS = 900.0
"""Outages of the Jobs server that last longer end the submission."""
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 15.0
MENTION_SECONDS = 60.0
STATE_TIMEOUT_SECONDS = 10
_REFUSAL = re.compile(r"status code 4(?!29)\d\d")
"""Answers that a retry does not change. 429 and 5xx come from a server that restarts or is overloaded."""
_UNKNOWN = "status code 404"
_ENTRYPOINT_LINE = "Running entrypoint for job "
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

T = TypeVar("T")


def connect(address: str | None, confirm: Callable[[str], bool] | None = None) -> Server:
    """The Jobs server of a cluster.

    Args:
        address: ``http://HOST:8265``. None uses RAY_ADDRESS, or else the server on this machine if ``confirm`` agrees.
        confirm: asks the user a question; None if no user can answer.

    Raises:
        UserError: no server answers, it wants a token, or nobody has named the cluster.
    """
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError("submitting jobs needs Ray: pip install 'clipmill[cluster]'") from error
    is_named = address is not None or any(os.environ.get(name) for name in _ADDRESS_VARIABLES)
    where = address or ("RAY_ADDRESS" if is_named else "this machine")
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray Jobs server at {where} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the "
            "cluster's token file"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"no Ray Jobs server answers at {where} ({line}); name one with --address") from error
    if not is_named and not (confirm and confirm(f"submit to the cluster at {client.get_address()}?")):
        raise UserError(
            f"nobody has named the cluster; give --address {client.get_address()} for the one that answers on this "
            "machine, or set RAY_ADDRESS"
        )
    return Server(client)


class Server:
    """Sends requests to the Jobs server, and retries them while it does not answer."""

    def __init__(self, client: JobSubmissionClient) -> None:
        self.client = client

    def jobs(self) -> list[JobDetails]:
        """All jobs that it knows."""
        return self.ask(self.client.list_jobs)

    def job(self, submission_id: str, stop: threading.Event | None = None) -> JobDetails | None:
        """One job; None if the server does not know it: it was deleted, or the cluster was restarted."""
        try:
            return self.ask(lambda: self.client.get_job_info(submission_id), stop)
        except RuntimeError as error:
            if _UNKNOWN not in str(error):
                raise
            return None

    def log_tail(self, submission_id: str, num_lines: int) -> list[str]:
        """The last lines of a job's log, without the line that Ray adds, which can follow a short job's own output."""
        lines = self.ask(lambda: self.client.get_job_logs(submission_id)).splitlines()
        return [line for line in lines if line.strip() and not line.startswith(_ENTRYPOINT_LINE)][-num_lines:]

    def nodes(self) -> list[dict[str, float]]:
        """The resources of each living node; empty if the server does not list them."""
        from ray.util.state import list_nodes

        try:
            found = list_nodes(
                address=self.client.get_address(), timeout=STATE_TIMEOUT_SECONDS, raise_on_missing_output=False
            )
        except Exception as error:  # of many types; the answer is only used in messages
            logger.debug("cannot list the nodes: %s", error)
            return []
        return [node.resources_total or {} for node in found if node.state == "ALIVE"]

    def ask(self, question: Callable[[], T], stop: threading.Event | None = None) -> T:
        """The server's answer.

        Args:
            question: calls the server; it must be safe to repeat.
            stop: event that a signal sets; None if no handler sets one.

        Raises:
            RuntimeError: the server refuses.
            UserError: the server wants a token, or the submitted job is invalid.
            Interrupted: the server did not answer for `AWAY_SECONDS`, or a signal arrived.
        """
        began = mentioned = 0.0
        num_failures = 0
        while True:
            try:
                return question()
            except Exception as error:  # of requests, of Ray, or from a proxy's HTML page: they share no base class
                _raise_final(error)
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            now = time.monotonic()
            began = began or now
            num_failures += 1
            if now - began > AWAY_SECONDS or (stop is not None and stop.is_set()):
                raise Interrupted(
                    f"the Ray Jobs server has not answered for {now - began:.0f} s ({line}); what was submitted runs "
                    "on, give the same command to wait for it again"
                )
            if not mentioned or now - mentioned > MENTION_SECONDS:
                logger.warning("the Ray Jobs server does not answer (%s); asking again", line)
                mentioned = now
            _sleep(pause(num_failures, MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS), stop)


def _raise_final(error: Exception) -> None:
    """Raises errors that a retry does not change; returns for others."""
    if type(error).__name__ == "AuthenticationError":
        raise UserError(f"the Ray Jobs server refuses the token: {str(error).splitlines()[0]}") from error
    if isinstance(error, OSError):
        return  # of requests; it also raises these if the answer is not JSON
    if isinstance(error, ValueError | TypeError):  # of Ray's client, before it asks
        raise UserError(f"Ray does not take this job: {' '.join(str(error).split())}") from error
    if isinstance(error, RuntimeError) and _REFUSAL.search(str(error)):
        raise error


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    """Sleeps in steps, because a signal only sets ``stop``. (`Event.wait` would hold a lock that the handler needs.)"""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not (stop is not None and stop.is_set()):
        time.sleep(min(left, 0.5))


def resources_text(resources: dict[str, Any]) -> str:
    """``1 GPU + 4 CPU``."""
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "nothing"
