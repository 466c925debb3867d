"""The log of a stage's driver, published in parts: ``logs/000003-0001.log`` is the first part of attempt 3.

A bucket cannot append, so the newest part is rewritten until it is full.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque

from clipmill import storage
from clipmill.errors import UserError
from clipmill.status.record import LOG_LINES

__all__ = ["LogParts", "read_log"]

FOLDER = "logs"
PART_BYTES = 2**18
_PART = re.compile(r"(\d{6,})-(\d{4,})\.log")


class LogParts(logging.Handler):
    """Collects the log of this process and publishes it in parts."""

    def __init__(self, url: str, attempt: int) -> None:
        super().__init__(logging.INFO)
        formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self.tail: deque[str] = deque(maxlen=LOG_LINES)
        """The newest messages."""
        self._url, self._attempt = url, attempt
        self._number, self._part, self._rest = 1, b"", b""
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Adds one log record."""
        self.add(self.format(record))

    def add(self, text: str) -> None:
        """Adds text that was not logged, such as a traceback."""
        text = storage.redacted(text)
        with self._guard:
            self._rest += f"{text}\n".encode(errors="replace")
            self.tail.extend(text.splitlines())

    def publish(self) -> None:
        """Publishes new lines, if there are any. Lines that could not be published are kept for the next call."""
        while rest := self._rest:
            room = PART_BYTES - len(self._part)
            part = self._part + rest[:room]
            name = f"{self._attempt:06d}-{self._number:04d}.log"
            storage.publish_bytes(storage.join(self._url, FOLDER, name), part)
            with self._guard:
                self._rest = self._rest[len(rest[:room]) :]
            self._number, self._part = (self._number + 1, b"") if len(part) == PART_BYTES else (self._number, part)


def read_log(url: str, attempt: int | None = None) -> str:
    """The log of one attempt at a stage.

    Args:
        url: URL of the stage's folder.
        attempt: number of the attempt; None reads the newest attempt with a log.

    Raises:
        UserError: there is no such log.
    """
    folder = storage.join(url, FOLDER)
    found = [(int(part[1]), int(part[2]), part[0]) for part in map(_PART.fullmatch, _names(folder)) if part]
    attempts = sorted({number for number, _, _ in found})
    if not attempts:
        raise UserError(f"no log at {storage.shown(folder)}; check that the stage has begun there")
    chosen = attempts[-1] if attempt is None else attempt
    if chosen not in attempts:
        raise UserError(f"no log of attempt {chosen} at {storage.shown(folder)}; choose from {attempts}")
    names = [name for number, _, name in sorted(found) if number == chosen]
    return b"".join(storage.read_bytes(storage.join(folder, name)) for name in names).decode(errors="replace")


def _names(folder: str) -> list[str]:
    return [entry.name for entry in storage.list_folder(folder)]
