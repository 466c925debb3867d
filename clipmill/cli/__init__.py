"""The command line: parsing and printing only. ``main`` is the console script ``clipmill``.

Each module holds the commands of one panel of ``clipmill --help``; `command` imports them all.
"""

from __future__ import annotations

import os
import signal

from clipmill.errors import Interrupted

__all__ = ["main"]


def main() -> None:
    """Runs the command that ``sys.argv`` names."""
    # First: to import the commands takes half a second, in which SIGTERM would end the process by its own status.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(Interrupted.exit_status))
    from clipmill.cli.command import run

    run()
