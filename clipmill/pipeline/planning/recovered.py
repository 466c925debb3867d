"""Planned rows whose file could not be read when it was listed, but can be now."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import storage
from clipmill.errors import StorageUnavailable, UserError
from clipmill.pipeline.plan import PLAN_COLUMNS, Plan
from clipmill.pipeline.planning.identity import PlannedVideos
from clipmill.pipeline.planning.listing import base_of
from clipmill.pipeline.planning.moved import planned_identities
from clipmill.pipeline.sources.record import file_identity

__all__ = ["recheck_rows", "recovered_ids"]

_REQUESTS_AT_ONCE = 32


def recheck_rows(table: pa.Table, base_url: str, planned: PlannedVideos) -> pa.Table:
    """Returns planned rows; those whose file is readable now lose their fault.

    A video that an extension has planned meanwhile keeps its fault here. So does a table row that names no video, since
    only a corrected table could help. Such a row differs from one with an unreadable file by its id, a hash of
    ``fault:`` and its text instead of its name (see `list_videos` of tables).
    """
    rows = table.to_pylist()
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        rows = list(pool.map(lambda row: _look_again(row, base_url, planned), rows))
    return pa.Table.from_pylist(rows, table.schema)


def _look_again(row: dict[str, Any], base_url: str, planned: PlannedVideos) -> dict[str, Any]:
    span = row["start_seconds"], row["end_seconds"]
    if row["fault"] is None or int(row["id"], 16) != base_of(f"fault:{storage.shown(row['url'])}", *span):
        return row
    try:
        url = storage.resolve(base_url, row["url"])
        entry = storage.stat(url)
        identity = file_identity(url, entry.bytes, entry.etag)
    except (OSError, ValueError, UserError) as error:
        if isinstance(error, StorageUnavailable) and not isinstance(error, storage.Unreadable):
            raise  # a bucket is unreachable
        return row
    if planned.knows(np.array([base_of(identity, *span)], np.uint64))[0]:
        return row
    return {**row, "fault": None, "bytes": entry.bytes, "etag": entry.etag, "file": identity}


def recovered_ids(plan: Plan) -> np.ndarray:
    """uint64[n]: the ids that recovered rows would get in a listing now; they keep the ids of their faults."""
    found = [np.empty(0, np.uint64)]
    columns = [name for name in PLAN_COLUMNS if name not in ("split", "unit", "ordinal")]
    for generation, table in plan.tables_by_generation(columns):
        if generation["kind"] == "retried":
            table = table.filter(pc.and_(pc.is_null(table["fault"]), pc.is_null(table["member"])))
            identities = planned_identities(table).to_pylist()
            spans = (table[name].to_pylist() for name in ("start_seconds", "end_seconds"))
            found.append(np.array([base_of(*one) for one in zip(identities, *spans, strict=True)], np.uint64))
    return np.concatenate(found)
