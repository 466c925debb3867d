"""Publishes the status and the log of a stage while it runs.

Both are written when the attempt begins, every 30 s while it runs, and when it ends. Each is one small object, and the
log is only written if it has grown. Finished units of work cost no request. If storage is unreachable, the stage
continues and publishes later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator

from clipmill import storage
from clipmill.board import BOARD, Snapshot
from clipmill.errors import ClipmillError, Interrupted, StorageUnavailable
from clipmill.lease import Lease
from clipmill.status.log import LogParts
from clipmill.status.record import CauseRecord, ProgressRecord, Record, State, read_record, write_record

__all__ = ["EVERY_SECONDS", "publishing"]

EVERY_SECONDS = 30.0
PATIENCE_SECONDS = 5.0
"""Seconds for which one publication is retried; it can be short because the next publication includes its content."""
LAST_PATIENCE_SECONDS = 60.0


@contextlib.contextmanager
def publishing(
    lease: Lease, stage: str, every_seconds: float = EVERY_SECONDS, run: str | None = None
) -> Iterator[None]:
    """Publishes the status and the log of the stage that runs in the ``with`` block, in the folder of its lease."""
    BOARD.begin(stage, lease.attempt, run, _earlier_seconds(lease.url))
    publisher = _Publisher(lease, stage, every_seconds)
    try:
        yield
    except BaseException as error:
        publisher.close(error)
        raise
    publisher.close(None)


class _Publisher:
    def __init__(self, lease: Lease, stage: str, every_seconds: float) -> None:
        self._lease, self._stage, self._every_seconds = lease, stage, every_seconds
        self._began = time.time()
        self._log = LogParts(lease.url, lease.attempt)
        logging.getLogger().addHandler(self._log)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._publish("running")
        while not self._is_closed.wait(self._every_seconds):
            self._publish("running")

    def close(self, error: BaseException | None) -> None:
        """Publishes the final state of the attempt."""
        logging.getLogger().removeHandler(self._log)
        self._is_closed.set()
        self._thread.join()
        if error is not None and not isinstance(error, ClipmillError | SystemExit | KeyboardInterrupt):
            self._log.add("".join(traceback.format_exception(error)).rstrip())
        if not isinstance(error, StorageUnavailable):  # storage has been unreachable for minutes already
            self._publish(*_end(self._lease, error), patience_seconds=LAST_PATIENCE_SECONDS)

    def _publish(self, state: State, error: str | None = None, patience_seconds: float = PATIENCE_SECONDS) -> None:
        # No warning here: the lease already warns about unreachable storage.
        with contextlib.suppress(OSError, ClipmillError), storage.limit_retries(patience_seconds):
            if self._lease.is_newest():  # a run that took over writes its own status
                self._log.publish()
                write_record(self._lease.url, self._record(state, error, BOARD.snapshot()))

    def _record(self, state: State, error: str | None, board: Snapshot) -> Record:
        causes = {
            kind: [CauseRecord(cause=cause, count=count) for cause, count in found]
            for kind, found in board.causes.items()
        }
        progress = board.progress
        return Record(
            stage=self._stage,
            attempt=self._lease.attempt,
            state=state,
            host=socket.gethostname(),
            pid=os.getpid(),
            began=self._began,
            written=time.time(),
            seconds=BOARD.seconds,
            every_seconds=self._every_seconds,
            progress=None if progress is None else ProgressRecord(**vars(progress)),
            facts=board.facts,
            error=error,
            log=list(self._log.tail),
            **causes,
        )


def _earlier_seconds(url: str) -> float:
    """Total seconds of the earlier attempts, as recorded by the last status."""
    try:
        return read_record(url).seconds
    except (FileNotFoundError, ClipmillError):
        return 0.0


def _end(lease: Lease, error: BaseException | None) -> tuple[State, str | None]:
    """The final state of an attempt, and the error that ended it."""
    if error is None:
        return "finished", None
    if isinstance(error, Interrupted | SystemExit | KeyboardInterrupt):
        return "stopped" if lease.stop_requested.is_set() else "interrupted", str(error)
    return "failed", str(error) if isinstance(error, ClipmillError) else f"{type(error).__name__}: {error}"
