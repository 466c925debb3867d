"""The lines of the log on stderr: plain text, or JSON where ``CLIPMILL_LOG_FORMAT=json``. Neither holds credentials."""

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
    """The format that the environment asks for.

    Raises:
        UserError: it asks for one that does not exist.
    """
    name = os.environ.get(FORMAT_VARIABLE) or "text"
    if name not in ("text", "json"):
        raise UserError(f"{FORMAT_VARIABLE}={name} is no format of the log; choose text or json")
    return _JsonLines() if name == "json" else _Text()


class _Text(logging.Formatter):
    """The message alone."""

    def format(self, record: logging.LogRecord) -> str:
        return storage.redacted(super().format(record))


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message; stage and attempt while one runs; unit if known."""

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
