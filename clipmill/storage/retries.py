"""How long failed requests are retried: a limit per request, and a shared budget per web server."""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from clipmill.errors import UserError
from clipmill.storage.failures import causes
from clipmill.storage.urls import is_web, server

__all__ = ["RETRY_SECONDS_VARIABLE", "RetryBudget", "limit_retries"]

RETRY_SECONDS_VARIABLE = "CLIPMILL_STORAGE_RETRY_SECONDS"
DEFAULT_RETRY_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 15.0

_lock = threading.Lock()
_waiting: Counter[str] = Counter()
_wasted_seconds: dict[str, float] = {}
"""Seconds spent waiting for each web server since a retry last succeeded. If a list names ten thousand files of a
server that answers 503, they share one budget instead of each waiting in full.
"""

_thread_limit_seconds: contextvars.ContextVar[float] = contextvars.ContextVar("longest_seconds", default=math.inf)


@contextlib.contextmanager
def limit_retries(seconds: float) -> Iterator[None]:
    """Limits the retries of this thread's requests to ``seconds``, for work that must not wait for an unreachable
    server.
    """
    token = _thread_limit_seconds.set(min(seconds, _thread_limit_seconds.get()))
    try:
        yield
    finally:
        _thread_limit_seconds.reset(token)


class RetryBudget:
    """The pauses between the attempts of one call.

    Attributes:
        num_pauses: pauses taken so far.
        seconds: how long the call is retried, counted from its first failure.
    """

    def __init__(self, url: str, longest_seconds: float) -> None:
        self.num_pauses = 0
        self.seconds = 0.0
        self._server = server(url) if is_web(url) else None
        self._longest_seconds = min(longest_seconds, _thread_limit_seconds.get())
        self._deadline: float | None = None

    def next_pause(self, error: BaseException) -> float | None:
        """Seconds to wait before the next attempt; None means to give up."""
        now = time.monotonic()
        if self._deadline is None:
            self.seconds = min(_retry_seconds(), self._longest_seconds)
            self._deadline = now + self.seconds
        # Half of the pause is random, so that thousands of workers do not retry at the same moment.
        pause = min(FIRST_PAUSE_SECONDS * 2**self.num_pauses, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
        pause = max(pause, _retry_after_seconds(error))
        is_over = now + pause > self._deadline
        if self._server is not None:
            is_over |= _wasted_seconds.get(self._server, 0.0) + pause > _retry_seconds()
        return None if is_over else pause

    def wait(self, pause_seconds: float) -> None:
        """Waits, and charges the server's budget; calls that wait at the same time share the charge."""
        self.num_pauses += 1
        if self._server is None:
            time.sleep(pause_seconds)
            return
        with _lock:
            _waiting[self._server] += 1
            cost = pause_seconds / _waiting[self._server]
            _wasted_seconds[self._server] = _wasted_seconds.get(self._server, 0.0) + cost
        time.sleep(pause_seconds)
        with _lock:
            _waiting[self._server] -= 1

    def succeeded(self) -> None:
        """Restores the server's budget after a call that succeeded on a retry."""
        if self.num_pauses and self._server is not None:
            with _lock:
                _wasted_seconds.pop(self._server, None)


def _retry_seconds() -> float:
    text = os.environ.get(RETRY_SECONDS_VARIABLE, "")
    try:
        return float(text or DEFAULT_RETRY_SECONDS)
    except ValueError as error:
        raise UserError(f"{RETRY_SECONDS_VARIABLE}={text} is not a number of seconds; correct or unset it") from error


def _retry_after_seconds(error: BaseException) -> float:
    """Seconds that the server's ``Retry-After`` header asks for, as a number or a date; 0 without the header."""
    headers: Any = next((found for one in causes(error) if (found := getattr(one, "headers", None))), {})
    text = headers.get("Retry-After", "")
    try:
        return max(float(text), 0.0) if text else 0.0
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return 0.0
