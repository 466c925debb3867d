"""One writer per folder: a lease that survives crashed owners and unsynchronised clocks.

The claims on a folder are numbered files, ``_lease/000001.json``, and the highest number owns the folder. A contender
takes over by creating the next number exclusively, so exactly one wins; the storage only needs to support "create if
absent". The number, ``attempt``, is also part of the names of checkpoints and metrics, so that a run and its successor
never write the same file.

``_lease/000001.stop`` asks the owner of that claim to stop. The owner's heartbeat lists the folder and finds it.
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clipmill import storage
from clipmill.errors import ClipmillError, DamagedDocument, Interrupted, StageFailed, StopRequested, UserError
from clipmill.grace import seconds_until_kill

__all__ = ["Claim", "Lease", "hold", "read_claim", "release_lost", "request_stop"]

SCHEMA = 1
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
"""An owner on another host counts as dead if its heartbeat does not advance for this time."""
RELEASE_SECONDS = 1.5
"""The folder is released this time before Ray kills the process; the release takes two requests."""
RELEASE_RETRY_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """A claim on a folder. It is sent to workers, which call `check` before they publish."""

    url: str
    attempt: int
    stop_requested: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)
    """Set once the owner has been asked to stop. Only in the process that holds the folder; it is not pickled."""

    def __reduce__(self) -> tuple[type[Lease], tuple[str, int]]:
        return type(self), (self.url, self.attempt)

    def is_newest(self) -> bool:
        """Whether no later run has taken over the folder."""
        return _newest_attempt(self.url) == self.attempt

    def check(self) -> None:
        """Raises `StageFailed` if a later run has taken over the folder."""
        newest = _newest_attempt(self.url)
        if newest != self.attempt:
            what = f"was taken over by attempt {newest}" if newest else "has lost its _lease folder"
            raise StageFailed(f"{self.url} {what} while attempt {self.attempt} still ran; run the same command again")


class Claim(NamedTuple):
    """The newest claim on a folder, read by any process."""

    attempt: int
    stage: str
    host: str
    pid: int
    beat: int
    is_released: bool
    is_alive: bool | None
    """Whether the owner's process is alive; None if it is on another host, where only its heartbeat can show that."""


@contextmanager
def hold(
    url: str,
    stage: str,
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
) -> Iterator[Lease]:
    """Owns a stage folder during the ``with`` block.

    After `request_stop`, this process receives SIGTERM. In a Ray job the folder is released shortly before Ray kills
    the process, even if the block still runs; that is safe because every writer checks the lease before it publishes.

    Raises:
        UserError: a living run owns the folder, or its storage does not support exclusive creation.
        StopRequested: instead of `Interrupted` and SystemExit, if a stop was requested.
    """
    # The token makes the claims of one process differ: `storage` accepts equal content as its own retried request.
    owner = {**_this_process(), "token": uuid.uuid4().hex}
    lease = _acquire(url, stage, owner, silence_seconds)
    keeper = _Keeper(lease, stage, owner, heartbeat_seconds)
    try:
        yield lease
    except (Interrupted, SystemExit) as error:
        if not lease.stop_requested.is_set():
            raise
        raise StopRequested(f"{stage} was stopped on request; run the same command to go on") from error
    finally:
        keeper.close()


def read_claim(url: str) -> Claim | None:
    """The newest claim on a folder; None if it was never claimed.

    Raises:
        DamagedDocument: the claim is not one that clipmill writes.
    """
    attempt = _newest_attempt(url)
    document = _read_document(Lease(url, attempt)) if attempt else None
    return None if document is None else _parse_claim(Lease(url, attempt), document)


def request_stop(url: str, attempt: int) -> None:
    """Asks the owner of a claim to stop cleanly; its next heartbeat finds the request."""
    storage.publish_document(_stop_url(Lease(url, attempt)), {"host": socket.gethostname()}, SCHEMA)


def release_lost(url: str, attempt: int) -> bool:
    """Releases the claim of a lost owner, so that the next run need not watch its heartbeat first.

    Returns:
        Whether a claim was released; not if a later one has replaced it. If its owner is alive after all, its next
        heartbeat takes the release back.
    """
    lease = Lease(url, attempt)
    document = _read_document(lease) if lease.is_newest() else None
    if document is None or document.get("released"):
        return False
    storage.publish_document(_claim_url(lease), {**document, "released": True}, SCHEMA)
    return True


# ------------------------------------------------------------------------------------------ taking a claim


def _claim_url(lease: Lease) -> str:
    return storage.join(lease.url, "_lease", f"{lease.attempt:06d}.json")


def _stop_url(lease: Lease) -> str:
    return storage.join(lease.url, "_lease", f"{lease.attempt:06d}.stop")


def _names(url: str) -> list[str]:
    return [entry.name for entry in storage.list_folder(storage.join(url, "_lease"))]


def _attempts(names: list[str]) -> list[int]:
    return sorted(int(name[:6]) for name in names if name.endswith(".json") and name[:6].isdigit())


def _newest_attempt(url: str) -> int:
    return max(_attempts(_names(url)), default=0)


def _acquire(url: str, stage: str, owner: dict[str, Any], silence_seconds: float) -> Lease:
    storage.check_create(storage.join(url, "_lease"))
    while True:
        names = _names(url)
        newest = max(_attempts(names), default=0)
        if newest:
            _wait_until_free(Lease(url, newest), silence_seconds)
        lease = Lease(url, newest + 1)
        if storage.create_document(_claim_url(lease), {"stage": stage, "released": False, "beat": 0, **owner}, SCHEMA):
            for name in names:
                if name.endswith((".json", ".stop")) and name[:6].isdigit():
                    storage.remove(storage.join(url, "_lease", name))
            return lease


def _wait_until_free(lease: Lease, silence_seconds: float) -> None:
    """Returns once the claim is released or its owner is dead; raises `UserError` if the owner is alive."""
    claim = _unreleased_claim(lease)
    if claim is None:
        return
    if claim.is_alive is not None:
        if claim.is_alive:
            raise _busy(lease, claim)
        logger.warning("taking over %s from attempt %d: its process is gone", lease.url, lease.attempt)
        return
    logger.warning("%s is claimed by %s; watching its heartbeat", lease.url, claim.host)
    deadline = time.monotonic() + silence_seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, silence_seconds / 10))
        now = _unreleased_claim(lease)
        if now is None:
            return
        if now.beat != claim.beat:
            raise _busy(lease, claim)
    logger.warning("taking over %s from attempt %d: silent for %.0f s", lease.url, lease.attempt, silence_seconds)


def _unreleased_claim(lease: Lease) -> Claim | None:
    """The claim; None if it is released, or if a later claim has removed it."""
    document = _read_document(lease)
    claim = None if document is None else _parse_claim(lease, document)
    return None if claim is None or claim.is_released else claim


def _busy(lease: Lease, claim: Claim) -> UserError:
    return UserError(
        f"{lease.url} is in use by {claim.stage} (process {claim.pid} on {claim.host}, attempt "
        f"{claim.attempt}); wait for it, stop it, or choose another root"
    )


def _read_document(lease: Lease) -> dict[str, Any] | None:
    try:
        return storage.read_document(_claim_url(lease), SCHEMA)
    except FileNotFoundError:  # a later claim has already removed it
        return None


def _parse_claim(lease: Lease, document: dict[str, Any]) -> Claim:
    here = _this_process()
    try:
        is_here = all(document[key] == here[key] for key in ("boot", "pid_namespace"))
        is_alive = _start_time(document["pid"]) == document["process_start"] if is_here else None
        stage, host, pid, beat, is_released = (document[key] for key in ("stage", "host", "pid", "beat", "released"))
    except KeyError as error:
        url = _claim_url(lease)
        raise DamagedDocument(f"{url} is damaged ({error} is missing); if no run owns the folder, remove it") from error
    return Claim(lease.attempt, stage, host, pid, beat, is_released, is_alive)


# ---------------------------------------------------------------------------------------- keeping a claim


class _Keeper:
    """Renews a claim, obeys stop requests, and releases the claim at the end or before this process is killed."""

    def __init__(self, lease: Lease, stage: str, owner: dict[str, Any], heartbeat_seconds: float) -> None:
        self._lease, self._body = lease, {"stage": stage, **owner}
        self._heartbeat_seconds = heartbeat_seconds
        self._is_closed = threading.Event()
        self._wakeup, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        self._hears_signals = threading.current_thread() is threading.main_thread() and self._listen()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def _listen(self) -> bool:
        """Makes Python write signals to our socket too, which it does immediately and for any handler."""
        before = signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        if before != -1:  # another part of the process uses it, for example a notebook
            signal.set_wakeup_fd(before)
            return False
        os.register_at_fork(after_in_child=self._stop_listening)  # signals to a child do not concern this lease
        return True

    def _stop_listening(self) -> None:
        if not self._is_closed.is_set():
            signal.set_wakeup_fd(-1)

    def close(self) -> None:
        if self._hears_signals:
            self._stop_listening()
        self._is_closed.set()
        self._signals.close()  # wakes the thread
        self._thread.join()
        self._wakeup.close()

    def _run(self) -> None:
        beat, kill_at = 0, math.inf
        next_beat = time.monotonic() + self._heartbeat_seconds
        while not self._is_closed.is_set():
            now = time.monotonic()
            if now >= kill_at - RELEASE_SECONDS:
                break
            if now >= next_beat:
                beat += 1
                if not self._beat(beat):
                    return  # writers learn it from check() before they publish
                next_beat = time.monotonic() + self._heartbeat_seconds
            if self._is_signalled(min(next_beat, kill_at - RELEASE_SECONDS) - now):
                seconds = seconds_until_kill()
                kill_at = math.inf if seconds is None else min(kill_at, time.monotonic() + seconds)
        self._release()

    def _is_signalled(self, timeout_seconds: float) -> bool:
        """Waits for SIGTERM or SIGINT; returns whether one arrived before the timeout."""
        ready, _, _ = select.select([self._wakeup], [], [], max(0.0, timeout_seconds))
        return bool(ready) and bool({signal.SIGTERM, signal.SIGINT} & set(self._wakeup.recv(1024)))

    def _beat(self, beat: int) -> bool:
        """Renews the claim and checks for a stop request; returns whether the claim is still the newest."""
        try:
            names = _names(self._lease.url)
            if max(_attempts(names), default=0) != self._lease.attempt:
                return False
            storage.publish_document(_claim_url(self._lease), {"released": False, "beat": beat, **self._body}, SCHEMA)
        except (OSError, ClipmillError) as error:  # storage is temporarily unreachable: the next beat retries
            logger.warning("cannot renew the lease on %s: %s", self._lease.url, error)
            return True
        if _stop_url(self._lease).rpartition("/")[2] in names and not self._lease.stop_requested.is_set():
            logger.warning("a stop of %s was requested", self._body["stage"])
            self._lease.stop_requested.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        return True

    def _release(self) -> None:
        """Marks the claim as released. If storage is unreachable or full, the next run detects the dead owner
        itself.
        """
        try:
            with storage.limit_retries(RELEASE_RETRY_SECONDS):
                if self._lease.is_newest():
                    storage.publish_document(
                        _claim_url(self._lease), {"released": True, "beat": 0, **self._body}, SCHEMA
                    )
        except (OSError, ClipmillError) as error:
            logger.warning("cannot release the lease: %s", error)


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
    """Id of the process namespace: containers of one host share its boot id but not its process ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot, "" if it is gone. It distinguishes reused process ids."""
    stat = _read_text(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may itself hold spaces
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""
