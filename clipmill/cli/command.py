"""Runs a command: logging, signals, and the exit status of each error (docs/design.md)."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

from clipmill import storage
from clipmill.cli.app import app
from clipmill.errors import ClipmillError, Interrupted, UserError
from clipmill.extras import explain_missing
from clipmill.status import formatter

# isort: off
# Importing a module registers its commands. `clipmill --help` lists them in this order.
from clipmill.cli import start, stages, models, results, data, cluster, watch  # noqa: F401
# isort: on

__all__ = ["app", "run"]

_NOISY_LOGGERS = ("DeepSpeed", "ray", "httpx", "botocore", "s3fs", "fsspec", "azure", "adlfs", "gcsfs", "google")


def run() -> None:
    """Runs the command that ``sys.argv`` names."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        _begin_logging()
        app(prog_name="clipmill")
    except ClipmillError as error:
        print(f"clipmill: {storage.redacted(str(error))}", file=sys.stderr)
        sys.exit(error.exit_status)
    except ModuleNotFoundError as error:
        missing = explain_missing(error)
        if missing is None:
            raise
        print(f"clipmill: {missing}", file=sys.stderr)
        sys.exit(UserError.exit_status)
    finally:
        # Python takes handlers back before it has ended, and SIGTERM would then replace the status that stands already.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _begin_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the process on SIGTERM and Ctrl-C, unless a stage has installed its own handler.

    SystemExit is not an `Exception`, so code that catches all errors of a damaged file does not swallow it.
    """
    print("clipmill: stopped; run the same command to go on", file=sys.stderr)
    raise SystemExit(Interrupted.exit_status)
