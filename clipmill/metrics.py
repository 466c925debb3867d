"""The metrics of a training run: each attempt writes one file, with one JSON record per line.

A record is ``{"step": int, "split": "train" | "val", name: number, ...}``. An attempt writes its file on the local disk
and uploads it whole, since buckets cannot append. A resumed run is a new attempt that begins at its checkpoint's step,
so readers merge files by step and the newest attempt wins.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from clipmill import storage
from clipmill.scratch import ScratchFolder

__all__ = ["ATTEMPT", "MetricsLog", "read_metrics"]

ATTEMPT = re.compile(r"\d{6,}-\d{4,}")
"""Name of an attempt: number of the lease, then number of the restart under that lease."""
_FILE_NAME = re.compile(ATTEMPT.pattern + r"\.jsonl")

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends records locally; `upload` publishes them as one whole file.

    Args:
        url: URL of the training folder; the file is ``metrics/<attempt>.jsonl`` in it.
        attempt: name of the writing attempt; later attempts must sort after earlier ones.
    """

    def __init__(self, url: str, attempt: str) -> None:
        self._url = storage.join(url, "metrics", f"{attempt}.jsonl")
        self._folder = ScratchFolder("metrics")
        self._path = self._folder.path / "metrics.jsonl"
        self._file = self._path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record of finite numbers to the local file."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def upload(self) -> None:
        """Publishes everything written so far."""
        self._file.flush()
        if self._path.stat().st_size:
            storage.publish_file(self._path, self._url)

    def close(self) -> None:
        """Removes the local file."""
        self._file.close()
        self._folder.close()


def read_metrics(url: str) -> list[dict[str, Any]]:
    """All records of a training folder, sorted by step.

    A newer attempt replaces all older records of steps after its first step. At its first step it replaces only the
    splits that it has recorded itself. Files with other names and lines that are not records are ignored.
    """
    merged: list[dict[str, Any]] = []
    for entry in storage.list_folder(storage.join(url, "metrics")):
        if not _FILE_NAME.fullmatch(entry.name):
            continue
        file_url = storage.join(url, "metrics", entry.name)
        records = _records(storage.read_bytes(file_url), file_url)
        if records:
            first_step = min(record["step"] for record in records)
            again = {record["split"] for record in records if record["step"] == first_step}
            merged = [
                record
                for record in merged
                if record["step"] < first_step or (record["step"] == first_step and record["split"] not in again)
            ]
            merged += records
    return sorted(merged, key=lambda record: record["step"])


def _records(data: bytes, url: str) -> list[dict[str, Any]]:
    records = []
    num_ignored = 0
    for line in data.splitlines():
        try:
            record = json.loads(line)
            if type(record["step"]) is not int or not isinstance(record["split"], str):
                raise TypeError(f"step {record['step']!r}")
        except (ValueError, TypeError, KeyError):
            num_ignored += 1
        else:
            records.append(record)
    if num_ignored:
        logger.warning("%s: ignored %d lines that are not records of clipmill", url, num_ignored)
    return records
