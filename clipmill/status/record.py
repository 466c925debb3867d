"""The document ``status.json`` of a stage: a few KB, regardless of the size of the stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipmill import storage
from clipmill.errors import DamagedDocument

__all__ = ["LOG_LINES", "Record", "State", "read_record", "write_record"]

SCHEMA = 1
NAME = "status.json"
LOG_LINES = 8
"""Number of last log lines in the document."""
MAX_CHARACTERS = 300
"""Maximum length of a text, such as a cause, a log line or a host name."""
MAX_NODES = 20
"""Maximum length of a list, such as the sick nodes."""

State = Literal["running", "finished", "failed", "interrupted", "stopped"]
"""``interrupted``: ended cleanly by a signal or unreachable storage; ``stopped``: by ``clipmill stop``."""

Seconds = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)  # unknown keys come from a newer clipmill and are ignored


class ProgressRecord(_Part):
    """Progress of a stage; see `clipmill.board.Progress`."""

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
    """The status that a stage publishes about itself.

    Attributes:
        stage: name of the stage.
        attempt: number of its lease.
        state: state at the time ``written``.
        host: host of the driver.
        pid: process id of the driver.
        began: when the attempt began, in seconds since the epoch by the driver's clock.
        written: when this status was written, by the same clock.
        seconds: duration of all attempts at the stage together; a killed attempt counts up to its last record.
        every_seconds: a running stage publishes again within this time.
        progress: None before the first unit of work is counted.
        facts: numbers and words about the stage: clips, loss, workers, nodes.
        failures: failed units of work of this attempt by cause, most frequent first.
        quarantine: excluded videos by cause, most frequent first.
        error: why the attempt ended; None while it runs and after it has finished.
        log: last lines of the log.
    """

    stage: str
    attempt: int
    state: State
    host: str
    pid: int
    began: float
    written: float
    seconds: Seconds = 0.0
    every_seconds: Seconds
    progress: ProgressRecord | None = None
    facts: dict[str, Any] = {}
    failures: list[CauseRecord] = []
    quarantine: list[CauseRecord] = []
    error: str | None = None
    log: list[str] = []


def write_record(url: str, record: Record) -> None:
    """Publishes the status of a stage in its folder; credentials are redacted, long texts and lists are cut."""
    storage.publish_document(storage.join(url, NAME), _shortened(record.model_dump()), SCHEMA)


def read_record(url: str) -> Record:
    """The status of the stage that writes into a folder.

    Raises:
        FileNotFoundError: there is no status.
        DamagedDocument: the document is not a status that clipmill writes.
        UserError: a newer clipmill wrote it.
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
