"""The state of each stage of a run, from its storage alone.

What a stage wrote last may be old: its driver may have been killed since, or the cluster may be gone. So its status is
held against its lease. On the host of the driver the process itself tells whether it lives. Elsewhere the age of the
status does; since clocks differ, an old status counts only if the heartbeat of the lease stands still as well.
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

__all__ = ["Shown", "StageStatus", "read_run", "read_stage"]

LOOK_SECONDS = HEARTBEAT_SECONDS + 5
"""Between two looks at a heartbeat."""
GRACE_SECONDS = 30.0
"""A status may come this much later than it should: the publisher waits for storage, and clocks differ."""

Shown = Literal["not begun", "starting", "lost"] | State
"""``lost``: it was running when it was last heard of, and its driver is gone or silent."""


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run as it is now.

    Attributes:
        stage: its name.
        url: its folder.
        shown: its state.
        record: what it said last; None if it has said nothing, or nothing readable.
        age_seconds: of the record, by the clock of this machine; None without a record.
        note: one more sentence for the operator, or "".
    """

    stage: str
    url: str
    shown: Shown
    record: Record | None = None
    age_seconds: float | None = None
    note: str = ""


def read_run(root: str) -> list[StageStatus]:
    """All stages of a run, in their order.

    Raises:
        UserError: no stage has begun there.
        StorageUnavailable: the storage is away.
    """
    folders = stage_folders(root)
    with ThreadPoolExecutor(len(folders)) as pool:
        found = list(pool.map(read_stage, folders, folders.values()))
    if all(status.shown == "not begun" for status in found):
        raise UserError(f"no stage has begun at {storage.shown(root)}; name the root of a run")
    return found


def read_stage(stage: str, url: str) -> StageStatus:
    """One stage, given its folder."""
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
        return StageStatus(stage, url, "finished", note=note or "it wrote no status")
    if claim is not None or note:
        return StageStatus(stage, url, "lost", note=note or f"attempt {claim.attempt if claim else 0} wrote no status")
    return StageStatus(stage, url, "not begun")


def _running(stage: str, url: str, record: Record, claim: Claim | None, note: str) -> StageStatus:
    """The state of a stage that was running when it wrote last."""

    def status(shown: Shown, more: str = "") -> StageStatus:
        return StageStatus(stage, url, shown, record, _age(record), note or more)

    if claim is None:
        return status("lost", "nobody holds its folder")
    if claim.is_released:
        return status("lost", "its driver ended without a word, and has released its folder")
    if claim.attempt > record.attempt:
        return _begun(stage, url, record, claim, note)
    if claim.is_alive is not None:
        return status("running") if claim.is_alive else status("lost", f"process {claim.pid} on this host is gone")
    if 0 <= _age(record) <= record.every_seconds + GRACE_SECONDS or _beats(url, claim):
        return status("running")
    return status("lost", f"no sign of life from {claim.host}; its cluster may be gone")


def _begun(stage: str, url: str, record: Record | None, claim: Claim, note: str) -> StageStatus:
    """The state of a stage whose newest attempt has written no status yet."""
    if claim.is_alive or (claim.is_alive is None and _beats(url, claim)):
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


def _beats(url: str, claim: Claim) -> bool:
    """Whether the heartbeat of a claim moves."""
    deadline = time.monotonic() + LOOK_SECONDS
    while time.monotonic() < deadline:
        time.sleep(3)
        now, _ = _claim_of(url)
        if now is None or now.is_released or (now.attempt, now.beat) != (claim.attempt, claim.beat):
            return now is not None and not now.is_released
    return False


def _age(record: Record) -> float:
    return time.time() - record.written
