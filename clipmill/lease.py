"""One writer a folder: a lease that survives crashed owners and unsynchronised clocks.

The claims on a folder are numbered files, ``_lease/000001.json``, each created exclusively; the highest
number owns the folder. Taking over means creating the next number, so of several contenders exactly one
wins, with nothing but "create if absent" asked of the storage. The number, ``attempt``, also names what
must not collide between a run and its successor (checkpoints, metrics).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from clipmill import storage
from clipmill.errors import ClipmillError, StageFailed, UserError

__all__ = ["Lease", "hold"]

SCHEMA = 1
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
"""An owner of another host whose heartbeat does not move for so long is taken for dead."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """A claim on a folder. Travels to workers, which call `check` before they publish."""

    url: str
    attempt: int

    def is_newest(self) -> bool:
        """Whether no later run has taken the folder over."""
        return _newest_attempt(self.url) == self.attempt

    def check(self) -> None:
        """Raises `StageFailed` when a later run has taken the folder over."""
        newest = _newest_attempt(self.url)
        if newest != self.attempt:
            what = f"was taken over by attempt {newest}" if newest else "has lost its _lease folder"
            raise StageFailed(f"{self.url} {what} while attempt {self.attempt} still ran; run the same command again")


@contextmanager
def hold(
    url: str,
    stage: str,
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
) -> Iterator[Lease]:
    """Owns a stage folder for the time of the ``with`` block.

    Raises:
        UserError: another run that is alive owns it, or its storage cannot tell who came first.
    """
    # The token makes claims of one process differ: a bucket takes equal content for a repeated put.
    owner = {**_this_process(), "token": uuid.uuid4().hex}
    lease = _acquire(url, stage, owner, silence_seconds)
    stopped = threading.Event()
    beats = threading.Thread(target=_beat, args=(lease, stage, owner, stopped, heartbeat_seconds), daemon=True)
    beats.start()
    try:
        yield lease
    finally:
        stopped.set()
        beats.join()
        _release(lease, stage, owner)


def _release(lease: Lease, stage: str, owner: dict[str, Any]) -> None:
    """Says that the folder is free. If storage is away or full, the next run finds out by itself: our error stands."""
    try:
        if lease.is_newest():
            storage.publish_document(_claim_url(lease), {"stage": stage, "released": True, **owner}, SCHEMA)
    except (OSError, ClipmillError) as error:
        logger.warning("cannot release the lease: %s", error)


def _claim_url(lease: Lease) -> str:
    return storage.join(lease.url, "_lease", f"{lease.attempt:06d}.json")


def _attempts(url: str) -> list[int]:
    names = [entry.name for entry in storage.list_folder(storage.join(url, "_lease"))]
    return sorted(int(name[:6]) for name in names if name.endswith(".json") and name[:6].isdigit())


def _newest_attempt(url: str) -> int:
    return max(_attempts(url), default=0)


def _acquire(url: str, stage: str, owner: dict[str, Any], silence_seconds: float) -> Lease:
    storage.check_create(storage.join(url, "_lease"))
    while True:
        attempts = _attempts(url)
        newest = max(attempts, default=0)
        if newest:
            _wait_until_free(Lease(url, newest), silence_seconds)
        lease = Lease(url, newest + 1)
        if storage.create_document(_claim_url(lease), {"stage": stage, "released": False, "beat": 0, **owner}, SCHEMA):
            for attempt in attempts:
                storage.remove(_claim_url(Lease(url, attempt)))
            return lease


def _wait_until_free(claim: Lease, silence_seconds: float) -> None:
    """Returns when the claim is released or its owner dead; raises `UserError` when it is alive."""
    document = _read_claim(claim)
    if document is None or document["released"]:
        return
    here = _this_process()
    if all(document[key] == here[key] for key in ("boot", "pid_namespace")):
        if _start_time(document["pid"]) != document["process_start"]:
            logger.warning("taking over %s from attempt %d: its process is gone", claim.url, claim.attempt)
            return
        raise _busy(claim, document)
    logger.warning("%s is claimed by %s; watching its heartbeat", claim.url, document["host"])
    deadline = time.monotonic() + silence_seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, silence_seconds / 10))
        now = _read_claim(claim)
        if now is None or now["released"]:
            return
        if now["beat"] != document["beat"]:
            raise _busy(claim, document)
    logger.warning("taking over %s from attempt %d: silent for %.0f s", claim.url, claim.attempt, silence_seconds)


def _busy(claim: Lease, document: dict[str, Any]) -> UserError:
    return UserError(
        f"{claim.url} is in use by {document['stage']} (process {document['pid']} on {document['host']}, attempt "
        f"{claim.attempt}); wait for it, stop it, or choose another root"
    )


def _read_claim(claim: Lease) -> dict[str, Any] | None:
    try:
        return storage.read_document(_claim_url(claim), SCHEMA)
    except FileNotFoundError:  # a later claim has already removed it
        return None


def _beat(lease: Lease, stage: str, owner: dict[str, Any], stopped: threading.Event, heartbeat_seconds: float) -> None:
    beat = 0
    while not stopped.wait(heartbeat_seconds):
        beat += 1
        try:
            if not lease.is_newest():
                return  # check() tells whoever is about to publish
            body = {"stage": stage, "released": False, "beat": beat, **owner}
            storage.publish_document(_claim_url(lease), body, SCHEMA)
        except (OSError, ClipmillError) as error:  # the storage is away for a moment: the next beat tries again
            logger.warning("cannot renew the lease on %s: %s", lease.url, error)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _read_text("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),
        "pid": pid,
        "process_start": _start_time(pid),
    }


def _read_text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    """Containers of one host share its boot id but not its process ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which a process began, "" if it is gone: tells a reused process id apart."""
    stat = _read_text(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may itself hold spaces
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""
