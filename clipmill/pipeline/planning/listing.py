"""Lists a source into tables of rows. Python objects live for one batch only, which bounds the memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import StorageUnavailable
from clipmill.pipeline.plan import SOURCE_COLUMNS
from clipmill.pipeline.planning.identity import hash64
from clipmill.pipeline.planning.progress import Progress
from clipmill.pipeline.sources import base_url, describe_files, list_videos
from clipmill.pipeline.sources.record import SourceVideo, file_identity
from clipmill.shards.manifest import SPLITS

__all__ = ["HASH_COLUMNS", "LISTED_COLUMNS", "NO_SPLIT", "base_of", "list_rows", "origin_of", "with_hashes"]

BATCH_ROWS = 2**16
NO_SPLIT = -1

_TEXT = pa.large_string()
LISTED_COLUMNS: dict[str, pa.DataType] = {
    **SOURCE_COLUMNS,
    "given": pa.int8(),
    "identity": _TEXT,
    "group": _TEXT,
    "together": _TEXT,
}
"""``given``: the split that the source gives (index in `SPLITS`), or `NO_SPLIT`. ``identity``, ``group`` and
``together``: see `SourceVideo`; the last two may be null.
"""

HASH_COLUMNS: dict[str, pa.DataType] = {"base": pa.uint64(), "origin": pa.uint64(), "place": pa.uint64()}
"""``base``: hash of the identity, span included. ``origin``: hash of the group, which decides the split. ``place``:
hash that orders the plan: that of the identity, or that of the file if its videos need it fetched whole.
"""

logger = logging.getLogger(__name__)


def list_rows(source: SourceConfig, progress: Progress, others: Counter[str]) -> Iterator[pa.Table]:
    """Lists a source once, as a stream. Continues where the ``progress`` of a killed planner ends.

    Args:
        source: the source to list.
        progress: stores what has been listed.
        others: counts files of a folder that are not videos, by extension.

    Yields:
        Tables of `LISTED_COLUMNS`.

    Raises:
        UserError: the source is missing, empty or unreadable.
    """
    yield from progress.resume(others)
    batch: list[tuple[SourceVideo, str]] = []
    for video, identity in _identified(list_videos(source, others, progress.mark), base_url(source)):
        batch.append((video, identity))
        mark = video.mark if progress.is_due() else None
        if mark is not None or len(batch) == BATCH_ROWS:
            table = _table_of(batch)
            batch = []
            progress.keep(table)
            if mark is not None:
                progress.publish(mark, others)
            yield table
    if batch:
        yield _table_of(batch)
    if others:
        logger.info("skipped files that are not videos: %s", describe_files(others))


def origin_of(source: SourceConfig, video: SourceVideo) -> int:
    """The origin of one listed video, which decides its split (`split_share`).

    Raises:
        FileNotFoundError: the file has vanished since.
    """
    for identified in _identified(iter([video]), base_url(source)):
        return int(with_hashes(_table_of([identified]))["origin"][0].as_py())
    raise FileNotFoundError(video.name)


def _identified(videos: Iterator[SourceVideo], base: str) -> Iterator[tuple[SourceVideo, str]]:
    """Yields videos with the identities of their files. Unreadable ones get a fault; vanished ones are skipped."""
    for video in videos:
        try:
            identity = video.identity or file_identity(storage.resolve(base, video.name), video.bytes, video.etag)
        except FileNotFoundError:
            logger.warning("%s vanished while the source was listed", storage.shown(video.name))
            continue
        except (OSError, storage.Refused) as error:
            if isinstance(error, StorageUnavailable) and not isinstance(error, storage.Unreadable):
                raise  # the bucket does not answer
            name, cause = storage.shown(video.name), getattr(error, "strerror", None) or error
            identity = f"fault:{name}"
            video = replace(video, fault=f"{name} cannot be read: {cause}")
        yield video, identity


def _table_of(batch: list[tuple[SourceVideo, str]]) -> pa.Table:
    columns: dict[str, list] = {
        "given": [SPLITS.index(video.split) if video.split else NO_SPLIT for video, _ in batch],
        "identity": [identity for _, identity in batch],
    }
    for name in LISTED_COLUMNS.keys() - columns.keys():
        attribute = "name" if name == "url" else name
        columns[name] = [getattr(video, attribute) for video, _ in batch]
    return pa.table({name: pa.array(columns[name], kind) for name, kind in LISTED_COLUMNS.items()})


def with_hashes(table: pa.Table) -> pa.Table:
    """Appends `HASH_COLUMNS` to rows of `LISTED_COLUMNS`."""
    names = ("identity", "group", "together", "start_seconds", "end_seconds")
    rows = zip(*(table[name].to_pylist() for name in names), strict=True)
    hashes = np.array([_hashes(*row) for row in rows], np.uint64).reshape(-1, len(HASH_COLUMNS))
    for name, numbers in zip(HASH_COLUMNS, hashes.T, strict=True):
        table = table.append_column(name, pa.array(np.ascontiguousarray(numbers)))
    return table


def base_of(identity: str, start_seconds: float | None, end_seconds: float | None) -> int:
    """The hash of a video's identity: the identity of its file, with the span if it has one."""
    is_whole = start_seconds is None and end_seconds is None
    return hash64(identity if is_whole else f"{identity}:{start_seconds}:{end_seconds}")


def _hashes(
    identity: str, group: str | None, together: str | None, start: float | None, end: float | None
) -> tuple[int, int, int]:
    whole = hash64(identity)
    return (
        base_of(identity, start, end),
        whole if group is None else hash64(group),
        whole if together is None else hash64(together),
    )
