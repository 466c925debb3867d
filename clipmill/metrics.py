"""The metrics of a training run: one JSON line a record, one file an attempt.

A record is ``{"step": int, "split": "train" | "val", name: number, ...}``. An attempt writes its file on
the local disk and uploads it whole, since buckets cannot append; a resumed run is a new attempt that
begins at its checkpoint's step, so readers merge by step and the newest attempt wins.
"""

from __future__ import annotations

import json
from typing import Any

from clipmill import storage
from clipmill.scratch import ScratchFolder

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends records locally; `upload` publishes them as one whole file.

    Args:
        url: the training folder; the file becomes ``metrics/<attempt>.jsonl`` in it.
        attempt: name of the attempt that writes; later attempts must sort after earlier ones.
    """

    def __init__(self, url: str, attempt: str) -> None:
        self._url = storage.join(url, "metrics", f"{attempt}.jsonl")
        self._folder = ScratchFolder("metrics")
        self._path = self._folder.path / "metrics.jsonl"
        self._file = self._path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record to the local file."""
        self._file.write(json.dumps(record) + "\n")

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
    """All records of a training folder, sorted by step; from a newer attempt's first step on, only its own count."""
    merged: list[dict[str, Any]] = []
    for entry in storage.list_folder(storage.join(url, "metrics")):
        if not entry.name.endswith(".jsonl"):
            continue
        records = [
            json.loads(line) for line in storage.read_bytes(storage.join(url, "metrics", entry.name)).splitlines()
        ]
        if records:
            first_step = min(record["step"] for record in records)
            merged = [record for record in merged if record["step"] < first_step] + records
    return sorted(merged, key=lambda record: record["step"])
