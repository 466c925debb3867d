"""The document ``status.json`` of a stage: a few KB, whatever the size of the stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipmill import storage
from clipmill.errors import DamagedDocument

__all__ = ["LOG_LINES", "Record", "State", "read_record", "write_record"]

SCHEMA = 1
NAME = "status.json"
LOG_LINES = 8
"""The last lines of the log that the document holds."""
MAX_CHARACTERS = 300
"""Of a cause, a line of the log, a host name."""
MAX_NODES = 20
"""Sick nodes that are named."""

State = Literal["running", "finished", "failed", "interrupted", "stopped"]
"""``interrupted``: ended in order by a signal or a storage that is away; ``stopped``: by ``clipmill stop``."""

Seconds = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)  # unknown keys are of a newer clipmill, and ignored


class ProgressRecord(_Part):
    """How far a stage is; see `clipmill.board.Progress`."""

    done: float
    total: float | None
    unit: str
    rate: float | None
    eta_seconds: Seconds | None


class CauseRecord(_Part):
    """How often one cause occurred."""

    cause: str
    count: int


class Record(_Part):
    """What a stage says about itself.

    Attributes:
        stage: its name.
        attempt: number of its lease.
        state: as of ``written``.
        host: of its driver.
        pid: of its driver.
        began: when the attempt began, seconds since the epoch by the driver's clock.
        written: when this was written, by the same clock.
        every_seconds: a running stage writes again within this time.
        progress: None before the first unit of work is counted.
        facts: numbers and words of the stage: clips, loss, workers, nodes.
        failures: failed units of work of this attempt by cause, most frequent first.
        quarantine: excluded videos by cause, most frequent first.
        error: why the attempt ended; None while it runs or after it finished.
        log: its last lines.
    """

    stage: str
    attempt: int
    state: State
    host: str
    pid: int
    began: float
    written: float
    every_seconds: Seconds
    progress: ProgressRecord | None = None
    facts: dict[str, Any] = {}
    failures: list[CauseRecord] = []
    quarantine: list[CauseRecord] = []
    error: str | None = None
    log: list[str] = []


def write_record(url: str, record: Record) -> None:
    """Publishes the status of a stage in its folder, without credentials and shortened."""
    storage.publish_document(storage.join(url, NAME), _shortened(record.model_dump()), SCHEMA)


def read_record(url: str) -> Record:
    """The status of the stage that writes into a folder.

    Raises:
        FileNotFoundError: there is none.
        DamagedDocument: it is not a status that clipmill writes.
        UserError: it is one of a newer clipmill.
    """
    record_url = storage.join(url, NAME)
    try:
        return Record.model_validate(storage.read_document(record_url, SCHEMA))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DamagedDocument(
            f"{record_url} is damaged ({where}: {problem['msg']}); the next run replaces it"
        ) from error


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value[:MAX_NODES]]
    if isinstance(value, str):
        text = storage.redacted(value)
        return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."
    return value
