"""What a planner has listed so far, where the next one finds it if this one is killed.

A listing of hours is published in parts under ``clips/plan/listing``: the rows, then a document that says behind which
name the part begins and ends (its marks, which the source type understands). Parts form a chain by their marks. Names
hold the attempt of the lease, so that planners never share one, and where a stale planner went on from the same mark as
its successor, the successor's part counts. A listing of less than `PUBLISH_SECONDS` publishes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipmill import storage
from clipmill.config import RunConfig, SourceConfig
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.pipeline.sources import is_file
from clipmill.shards.commits import is_count
from clipmill.shards.format import file_sha256

__all__ = ["Progress"]

SCHEMA = 1
PUBLISH_SECONDS = 30.0
"""Between two parts: what a kill costs."""

logger = logging.getLogger(__name__)


class Progress:
    """The published part of one listing.

    Attributes:
        mark: behind which the listing goes on; None: at its beginning.
    """

    def __init__(self, config: RunConfig, lease: Lease, generation: int, folder: Path) -> None:
        """Finds what earlier planners of this generation and source have left.

        Args:
            config: of the run.
            lease: on its clips.
            generation: the number of the generation that is planned.
            folder: for files on this machine.
        """
        folder.mkdir()
        self._url = config.folder("clips", "plan", "listing")
        self._lease, self._folder = lease, folder
        self._key = _key_of(config.data.source, generation)
        self._found = self._find_chain()
        self._num_published = 0
        self._writer: pq.ParquetWriter | None = None
        self._last = time.monotonic()
        self.mark: str | None = self._found[-1]["mark"] if self._found else None

    def resume(self, others: Counter[str]) -> Iterator[pa.Table]:
        """The rows that earlier planners listed; adds what they counted to ``others``.

        Raises:
            UserError: rows are damaged.
        """
        if not self._found:
            return
        logger.info(
            "going on with the listing behind %s, after %d videos",
            storage.shown(str(self.mark)),
            sum(part["videos"] for part in self._found),
        )
        others.update(self._found[-1]["others"])
        for part in self._found:
            path = self._folder / "found.parquet"
            url = storage.join(self._url, part["file"])
            storage.fetch(url, path)
            if file_sha256(path) != part["sha256"]:
                raise UserError(f"{url} is damaged; remove {self._url} and run the same command again")
            for batch in pq.ParquetFile(path).iter_batches():
                yield pa.Table.from_batches([batch])

    def is_due(self) -> bool:
        """Whether it is time to publish."""
        return time.monotonic() - self._last >= PUBLISH_SECONDS

    def keep(self, table: pa.Table) -> None:
        """Adds rows to the next part."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._folder / "part.parquet", table.schema, compression="zstd")
        self._writer.write_table(table)

    def publish(self, mark: str, others: Counter[str]) -> None:
        """Publishes the rows that were kept since the last part.

        Args:
            mark: of the last of them.
            others: files that are no videos, of the whole listing up to there.

        Raises:
            StageFailed: a later run has taken the folder over.
        """
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        path = self._folder / "part.parquet"
        name = f"{self._lease.attempt:06d}-{self._num_published:06d}"
        document = {
            "listing": self._key,
            "attempt": self._lease.attempt,
            "after": self.mark,
            "mark": mark,
            "sha256": file_sha256(path),
            "videos": pq.read_metadata(path).num_rows,
            "others": dict(others),
        }
        self._lease.check()
        storage.publish_file(path, storage.join(self._url, f"{name}.parquet"))
        storage.create_document(storage.join(self._url, f"{name}.json"), document, SCHEMA)
        self.mark = mark
        self._num_published += 1
        self._has_parts = True
        self._last = time.monotonic()

    def remove(self) -> None:
        """Removes all parts, also of other listings: the generation holds, or there was nothing to plan."""
        if self._has_parts:
            self._lease.check()
            storage.remove_tree(self._url)

    def _find_chain(self) -> list[dict[str, Any]]:
        names = {entry.name for entry in storage.list_folder(self._url)}
        self._has_parts = bool(names)
        by_start: dict[str | None, dict[str, Any]] = {}
        for name in sorted(name for name in names if name.endswith(".json")):
            rows = f"{name.removesuffix('.json')}.parquet"
            document = storage.read_document(storage.join(self._url, name), SCHEMA)
            if rows in names and _is_part(document) and document["listing"] == self._key:
                by_start[document["after"]] = {**document, "file": rows}  # later attempts win
        chain: list[dict[str, Any]] = []
        mark = None
        while mark in by_start:
            chain.append(by_start.pop(mark))
            mark = chain[-1]["mark"]
        return chain


def _is_part(document: dict[str, Any]) -> bool:
    """Whether a document is of this form; what is not counts as not listed."""
    texts = [document.get(name) for name in ("listing", "mark", "sha256")]
    others = document.get("others")
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(document.get("after"), str | None)
        and is_count(document.get("videos"))
        and isinstance(others, dict)
        and all(map(is_count, others.values()))
    )


def _key_of(source: SourceConfig, generation: int) -> str:
    """Tells listings apart: a part of another one is no part of ours."""
    state: dict[str, Any] = {"generation": generation, "source": source.model_dump(mode="json")}
    if is_file(source):
        with contextlib.suppress(FileNotFoundError):  # the listing will say so
            state["file"] = astuple(storage.stat(storage.absolute(source.url)))
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
