"""The status of a run as text for a terminal or a log."""

from __future__ import annotations

import re
from math import isfinite

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipmill import storage
from clipmill.progress import duration
from clipmill.status.read import StageStatus
from clipmill.status.record import CauseRecord, ProgressRecord

__all__ = ["printable", "render"]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Escapes control characters, which could move the cursor or change colours."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def render(root: str, stages: list[StageStatus]) -> Group:
    """A table of all stages, and a paragraph about each stage that runs or needs attention."""
    table = Table("stage", "state", "done", "rate", "ETA", "attempt", title=f"run {storage.shown(root)}")
    for status in stages:
        table.add_row(status.stage, status.shown, *_progress_cells(status), _attempt(status))
    paragraphs = [
        _paragraph(status) for status in stages if status.note or status.shown not in ("not begun", "finished")
    ]
    return Group(table, *(Text(printable(text)) for text in paragraphs))


def _progress_cells(status: StageStatus) -> tuple[str, str, str]:
    progress = status.record.progress if status.record else None
    if progress is None:
        return "", "", ""
    total = "" if progress.total is None else f"/{_number(progress.total)}"
    done = f"{_number(progress.done)}{total} {progress.unit}"
    if status.shown != "running":
        return done, "", ""
    return done, _rate(progress), "?" if progress.eta_seconds is None else duration(progress.eta_seconds)


def _rate(progress: ProgressRecord) -> str:
    return "?" if progress.rate is None else f"{_number(progress.rate)}/s"


def _attempt(status: StageStatus) -> str:
    return str(status.record.attempt) if status.record else ""


def _paragraph(status: StageStatus) -> str:
    """All details of one stage, with the last lines of its log."""
    record, lines = status.record, [f"{status.stage}: {status.shown}"]
    if record is not None:
        age = duration(abs(status.age_seconds or 0))
        when = f"{age} ago" if (status.age_seconds or 0) >= 0 else f"{age} ahead of this machine's clock"
        lines[0] += f" as of {when}, attempt {record.attempt}, process {record.pid} on {record.host}"
    if status.note:
        lines.append(f"  {status.note}")
    if record is not None:
        if record.error:
            lines.append(f"  {record.error}")
        if record.facts:
            lines.append("  " + "  ".join(f"{name} {_fact(value)}" for name, value in record.facts.items()))
        lines += _causes("failed units", record.failures) + _causes("quarantined videos", record.quarantine)
        if record.log:
            lines += ["  last lines of its log:", *(f"    {line}" for line in record.log)]
    return "\n".join(lines)


def _causes(title: str, causes: list[CauseRecord]) -> list[str]:
    if not causes:
        return []
    return [f"  {title}: {sum(one.count for one in causes)}", *(f"    {one.count} x {one.cause}" for one in causes)]


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or (isfinite(value) and value == int(value)) else f"{value:.3g}"
