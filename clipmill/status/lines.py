"""Formats of the log on stderr: plain text, or JSON with ``CLIPMILL_LOG_FORMAT=json``. Credentials are redacted."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

from clipmill import storage
from clipmill.board import BOARD
from clipmill.errors import UserError

__all__ = ["FORMAT_VARIABLE", "formatter"]

FORMAT_VARIABLE = "CLIPMILL_LOG_FORMAT"


def formatter() -> logging.Formatter:
    """The log format that the environment selects.

    Raises:
        UserError: the environment names an unknown format.
    """
    name = os.environ.get(FORMAT_VARIABLE) or "text"
    if name not in ("text", "json"):
        raise UserError(f"{FORMAT_VARIABLE}={name} is not a log format; choose text or json")
    return _JsonLines() if name == "json" else _Text()


class _Text(logging.Formatter):
    """Only the message."""

    def format(self, record: logging.LogRecord) -> str:
        return storage.redacted(super().format(record))


class _JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message; stage and attempt while one runs; unit if known."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": storage.redacted(super().format(record)),
            "stage": BOARD.stage,
            "attempt": BOARD.attempt,
            "unit": getattr(record, "unit", None),
        }
        return json.dumps({name: value for name, value in facts.items() if value is not None})
