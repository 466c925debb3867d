"""The exceptions a user can meet, and the exit status each one becomes.

Everything else is a bug or an outage: it keeps its traceback and exits 1.
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
    """The stage could not finish for a reason outside the configuration (exit 1)."""


class StorageUnavailable(StageFailed, OSError):
    """A bucket's server was away for longer than an operation may wait (exit 75): run again once it is back.

    An `OSError`, as a failing disk gives.
    """

    exit_status = 75


class UserError(ClipmillError):
    """Something the user can fix (exit 2): the message says what is wrong, where, and what to do."""

    exit_status = 2


class DiskUnusable(UserError, OSError):
    """A local disk is full, read-only or forbidden; an `OSError`, as the system itself raises."""


class DamagedDocument(UserError):
    """A document of a run cannot be read. Whoever can derive it from others writes it anew."""


class Interrupted(ClipmillError):
    """Stopped after a clean checkpoint or commit (exit 75): submit the same command again."""

    exit_status = 75


class StopRequested(Interrupted):
    """As `Interrupted`, by ``clipmill stop`` (exit 76): nobody runs it again unasked."""

    exit_status = 76
