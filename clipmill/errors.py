"""The exceptions that users see, and the exit status of each.

Any other exception is a bug or an outage: it is printed with its traceback, exit status 1.
"""

from __future__ import annotations

__all__ = [
    "ClipmillError",
    "DamagedDocument",
    "DiskUnusable",
    "Interrupted",
    "StageFailed",
    "StopRequested",
    "StorageUnavailable",
    "UserError",
]


class ClipmillError(Exception):
    """Base of the errors that are printed as one line, without a traceback."""

    exit_status = 1


class StageFailed(ClipmillError):
    """The stage failed for a reason outside the configuration (exit 1)."""


class StorageUnavailable(StageFailed, OSError):
    """A bucket's server was unreachable for longer than the retry limit (exit 75): run again once it is back.

    It is an `OSError`, like the error of a failing disk, so code that handles one handles both.
    """

    exit_status = 75


class UserError(ClipmillError):
    """Something the user can fix (exit 2): the message says what is wrong, where, and what to do."""

    exit_status = 2


class DiskUnusable(UserError, OSError):
    """A local disk is full, read-only or forbidden. It is an `OSError`, like the system error that it replaces."""


class DamagedDocument(UserError):
    """A JSON document of a run cannot be read. Callers that can rebuild it from other data do so."""


class Interrupted(ClipmillError):
    """Stopped after a clean checkpoint or commit (exit 75): submit the same command again."""

    exit_status = 75


class StopRequested(Interrupted):
    """As `Interrupted`, but requested with ``clipmill stop`` (exit 76): nothing restarts the stage automatically."""

    exit_status = 76
