"""Publishes the progress of a listing, so that a planner can continue where a killed one stopped.

A long listing is published in parts under ``clips/plan/listing``: the rows, then a document with the marks at which the
part begins and ends. A mark is a position that the source type understands. Parts form a chain by their marks. Their
names contain the attempt of the lease, so planners never write the same one; if a stale planner continued from the same
mark as its successor, the successor's part is used. A listing shorter than `PUBLISH_SECONDS` publishes nothing.
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
"""Time between two parts, which a kill may cost."""

logger = logging.getLogger(__name__)


class Progress:
    """The published part of one listing.

    Attributes:
        mark: position after which the listing continues; None for its beginning.
    """

    def __init__(self, config: RunConfig, lease: Lease, generation: int, folder: Path) -> None:
        """Finds the parts that earlier planners of this generation and source published.

        Args:
            config: config of the run.
            lease: lease on the run's clips.
            generation: number of the generation that is planned.
            folder: scratch folder, created here.
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
        """Yields the rows that earlier planners listed, and adds their counts to ``others``.

        Raises:
            UserError: rows are damaged.
        """
        if not self._found:
            return
        logger.info(
            "continuing the listing after %s, with %d videos listed so far",
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
        """Whether it is time to publish a part."""
        return time.monotonic() - self._last >= PUBLISH_SECONDS

    def keep(self, table: pa.Table) -> None:
        """Adds rows to the next part."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._folder / "part.parquet", table.schema, compression="zstd")
        self._writer.write_table(table)

    def publish(self, mark: str, others: Counter[str]) -> None:
        """Publishes the rows that were kept since the last part.

        Args:
            mark: mark of the last row.
            others: counts of files that are not videos, for the whole listing so far.

        Raises:
            StageFailed: a later run has taken over the folder.
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
        """Removes all parts, including those of other listings, once the generation exists or there was nothing to
        plan.
        """
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
    """Whether a document is valid. Parts with invalid documents are ignored."""
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
    """Identifies a listing, so that parts of other listings are ignored."""
    state: dict[str, Any] = {"generation": generation, "source": source.model_dump(mode="json")}
    if is_file(source):
        with contextlib.suppress(FileNotFoundError):  # the listing will say so
            state["file"] = astuple(storage.stat(storage.absolute(source.url)))
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
