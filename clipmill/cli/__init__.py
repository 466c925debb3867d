"""The command line: parsing and printing only. ``main`` is the console script ``clipmill``.

Each module holds the commands of one panel of ``clipmill --help``; `app` imports them all.
"""

from __future__ import annotations

from clipmill.cli.app import app
from clipmill.cli.main import main

__all__ = ["app", "main"]
