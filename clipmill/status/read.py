"""The state of each stage of a run, from its storage alone.

The status that a stage wrote last may be old: its driver may have been killed, or the cluster may be gone. It is
therefore checked against the stage's lease. On the driver's host, the driver's process shows whether the stage runs.
On other hosts the age of the status shows it; since clocks differ, a stage with an old status only counts as lost if
the heartbeat of its lease does not advance either.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from clipmill import storage
from clipmill.errors import UserError
from clipmill.lease import HEARTBEAT_SECONDS, Claim, read_claim
from clipmill.status.places import stage_folders
from clipmill.status.record import Record, State, read_record

__all__ = ["Shown", "StageStatus", "beats", "read_run", "read_stage"]

WATCH_SECONDS = HEARTBEAT_SECONDS + 5
"""How long a heartbeat is watched before it counts as stopped."""
GRACE_SECONDS = 30.0
"""A status may be this much late: the publisher waits for storage, and clocks differ."""

Shown = Literal["not begun", "starting", "lost"] | State
"""``lost``: the last status says that the stage runs, but its driver is gone or silent."""


@dataclass(frozen=True)
class StageStatus:
    """Current state of one stage of a run.

    Attributes:
        stage: name of the stage.
        url: URL of its folder.
        shown: its state.
        record: its last status; None if it is missing or unreadable.
        age_seconds: age of the record by this machine's clock; None without a record.
        note: one more sentence for the operator, or "".
    """

    stage: str
    url: str
    shown: Shown
    record: Record | None = None
    age_seconds: float | None = None
    note: str = ""


def read_run(root: str) -> list[StageStatus]:
    """The state of all stages of a run, in the order of a run.

    Raises:
        UserError: no stage has begun there.
        StorageUnavailable: storage is unreachable.
    """
    folders = stage_folders(root)
    with ThreadPoolExecutor(len(folders)) as pool:
        found = list(pool.map(read_stage, folders, folders.values()))
    if all(status.shown == "not begun" for status in found):
        raise UserError(f"no stage has begun at {storage.shown(root)}; name the root of a run")
    return found


def read_stage(stage: str, url: str) -> StageStatus:
    """The state of one stage, given its folder."""
    record, note = None, ""
    try:
        record = read_record(url)
    except FileNotFoundError:
        pass
    except UserError as error:
        note = str(error)
    claim, claim_note = _claim_of(url)
    note = note or claim_note
    if record is not None and record.state == "running":
        return _running(stage, url, record, claim, note)
    if claim is not None and not claim.is_released and (record is None or claim.attempt > record.attempt):
        return _begun(stage, url, record, claim, note)
    if record is not None:
        return StageStatus(stage, url, record.state, record, _age(record), note)
    if storage.exists(storage.join(url, "summary.json")):
        return StageStatus(stage, url, "finished", note=note or "it has not written a status")
    if claim is not None or note:
        what = f"attempt {claim.attempt if claim else 0} has not written a status"
        return StageStatus(stage, url, "lost", note=note or what)
    return StageStatus(stage, url, "not begun")


def _running(stage: str, url: str, record: Record, claim: Claim | None, note: str) -> StageStatus:
    """The state of a stage whose last status says that it runs."""

    def status(shown: Shown, more: str = "") -> StageStatus:
        return StageStatus(stage, url, shown, record, _age(record), note or more)

    if claim is None:
        return status("lost", "no run holds its folder")
    if claim.is_released:
        return status("lost", "its driver has released its folder, but ended without a final status")
    if claim.attempt > record.attempt:
        return _begun(stage, url, record, claim, note)
    if claim.is_alive is not None:
        return status("running") if claim.is_alive else status("lost", f"process {claim.pid} on this host is gone")
    if 0 <= _age(record) <= record.every_seconds + GRACE_SECONDS or beats(url, claim):
        return status("running")
    return status("lost", f"its driver on {claim.host} does not respond; its cluster may be gone")


def _begun(stage: str, url: str, record: Record | None, claim: Claim, note: str) -> StageStatus:
    """The state of a stage whose newest attempt has not written a status yet."""
    if claim.is_alive or (claim.is_alive is None and beats(url, claim)):
        shown: Shown = "starting" if claim.stage == stage.partition("/")[0] else "running"
        return StageStatus(stage, url, shown, None, None, note or f"{claim.stage}, attempt {claim.attempt}")
    age_seconds = None if record is None else _age(record)
    return StageStatus(
        stage, url, "lost", record, age_seconds, note or f"attempt {claim.attempt} ended before it wrote its status"
    )


def _claim_of(url: str) -> tuple[Claim | None, str]:
    try:
        return read_claim(url), ""
    except UserError as error:
        return None, str(error)


def beats(url: str, claim: Claim) -> bool:
    """Whether the heartbeat of a claim advances; watches it for up to 15 s."""
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(3)
        now, _ = _claim_of(url)
        if now is None or now.is_released or (now.attempt, now.beat) != (claim.attempt, claim.beat):
            return now is not None and not now.is_released
    return False


def _age(record: Record) -> float:
    return time.time() - record.written
