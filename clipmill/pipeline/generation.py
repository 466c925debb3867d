"""Makes the generations of a plan: the first from a listing, further ones from what came or failed since.

A generation is planned once. Its rows are written first, under a name with their hash, and its document is created
last: a planner that is killed, or loses against another one, leaves the plan as it was. The generation that a run has
not finished yet is not planned again by the same command.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.lease import Lease
from clipmill.pipeline.listing import NO_ELDERS, NO_SPLIT, Elders, hash64, list_source, tell_apart
from clipmill.pipeline.plan import (
    BATCH_ROWS,
    PLAN_COLUMNS,
    GenerationKind,
    Plan,
    create_generation,
    load_plan,
    read_generations,
)
from clipmill.pipeline.yields import Yield, measure_yield
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import file_sha256
from clipmill.shards.manifest import SPLITS

__all__ = ["extend_plan", "make_plan", "retry_videos"]

logger = logging.getLogger(__name__)

_OWN_COLUMNS = ("split", "unit", "ordinal", "id")
"""Of `PLAN_COLUMNS`, those that a generation decides; the others come from the source."""


_MOST_VIDEOS = 10_000
"""In a unit: a killed one is done again."""

_LEAST_OUTPUT_BYTES, _FEWEST_UNITS = 2**20, 4
"""A data set of less than ``_FEWEST_UNITS`` shards is cut into so many units, as long as each makes the first."""

_ENDINGS_KEPT = 100
"""Of other files, the endings that the plan keeps."""


def make_plan(config: RunConfig, lease: Lease) -> Plan:
    """Lists the source once and publishes the plan.

    Raises:
        UserError: the source is missing, empty or unreadable; nothing has been written then.
        StageFailed: another run owns the folder, or has planned meanwhile; the plan is as that run left it.
    """
    _add_listed(config, lease, None)
    return load_plan(config)


def extend_plan(config: RunConfig, lease: Lease, plan: Plan) -> bool:
    """Lists the source again and plans the videos that no generation has; False: there are none.

    Raises:
        UserError: the source is missing, empty or unreadable; nothing has been written then.
        StageFailed: another run owns the folder, or has planned meanwhile; the plan is as that run left it.
    """
    return _add_listed(config, lease, plan)


def retry_videos(config: RunConfig, lease: Lease, plan: Plan, ids: Collection[str]) -> bool:
    """Plans videos of earlier generations anew, in units of their own; False: there are none.

    Raises:
        StageFailed: another run owns the folder, or has planned meanwhile; the plan is as that run left it.
    """
    places = np.flatnonzero(np.isin(plan.ids(), np.array([int(i, 16) for i in ids], np.uint64)))
    if not len(places):
        return False
    table = plan.rows(places)
    numbers = np.array([int(i, 16) for i in table["id"].to_pylist()], np.uint64)
    _, firsts = np.unique(numbers, return_index=True)  # one that failed twice stands in two generations
    is_val = np.array([split == "val" for split in table["split"].to_pylist()])[firsts]
    order = np.lexsort((numbers[firsts], is_val))
    known = Yield.of_generation(plan.generations[-1])
    facts = {"duplicates": 0}
    _publish(config, lease, plan, "retried", table, firsts[order], is_val[order], numbers[firsts][order], known, facts)
    return True


def _add_listed(config: RunConfig, lease: Lease, plan: Plan | None) -> bool:
    listing = list_source(config.data.source)
    elders, num_known_duplicates = NO_ELDERS, 0
    if plan is not None:
        elders, num_known_duplicates = _elders(plan), plan.num_duplicates
    ids, keep, ambiguous = tell_apart(
        listing.bases, listing.content, lambda row: listing.table["url"][row].as_py(), elders
    )
    # Split by an unrefined hash: a look-alike that is added later must not move its elder.
    is_val = np.fromiter((_share(config.seed, one) < config.data.val_fraction for one in _ints(listing.groups)), bool)
    is_val = np.where(listing.splits == NO_SPLIT, is_val, listing.splits == SPLITS.index("val"))
    num_duplicates = max(int(len(keep) - keep.sum()) - num_known_duplicates, 0)
    rows = np.flatnonzero(keep & ~elders.holds(ids))
    if plan is not None and not len(rows):
        return False
    order = rows[np.lexsort((ids[rows], listing.places[rows], is_val[rows]))]
    facts = {
        "duplicates": num_duplicates,
        "ambiguous": sorted(f"{base:016x}" for base in ambiguous),
        "other_files": dict(listing.others.most_common(_ENDINGS_KEPT)),
    }
    found = measure_yield(config, listing.table, order)
    _publish(config, lease, plan, "listed", listing.table, order, is_val[order], ids[order], found, facts)
    return True


def _elders(plan: Plan) -> Elders:
    ids = plan.ids()
    ambiguous = {int(base, 16) for generation in plan.generations for base in generation.get("ambiguous", [])}

    def url(number: int) -> str:
        return plan.rows(np.flatnonzero(ids == np.uint64(number))[:1])["url"][0].as_py()

    return Elders(np.sort(ids), ambiguous, url)


def _publish(
    config: RunConfig,
    lease: Lease,
    plan: Plan | None,
    kind: GenerationKind,
    table: pa.Table,
    order: np.ndarray,
    is_val: np.ndarray,
    ids: np.ndarray,
    expected: Yield,
    facts: dict[str, Any],
) -> None:
    """Writes one more generation.

    Args:
        config: of the run.
        lease: on its clips.
        plan: the generations so far.
        kind: of the generation.
        table: source columns of at least these videos.
        order: int64[n], rows of the table in the order of the plan.
        is_val: bool[n], whether each is in ``val``.
        ids: uint64[n], their ids.
        expected: what they will make.
        facts: for its document.
    """
    sizes = table["bytes"].to_numpy()[order]
    outputs = expected.of(table, config.data.clip)[order]
    read_sizes = np.where(_repeats_file(table, order), 0, sizes)
    units, ordinals = cut_units(read_sizes, outputs, is_val, config.data.unit_bytes, config.data.shard_bytes)
    num_units = {split: int(units[is_val == (split == "val")].max(initial=-1)) + 1 for split in SPLITS}
    earlier = [] if plan is None else plan.generations
    if plan is not None:
        units += np.where(is_val, plan.num_units("val"), plan.num_units("train")).astype(np.int32)
    with ScratchFolder("plan") as folder:
        path = folder / "rows.parquet"
        _write_rows(path, table, order, is_val, units, ordinals, ids)
        sha256 = file_sha256(path)
        generation = {
            "kind": kind,
            "file": f"gen-{len(earlier):04d}-{sha256[:8]}.parquet",
            "sha256": sha256,
            "videos": len(order),
            "bytes": int(sizes.sum()),
            "units": num_units,
            "yield": expected.document,
            **facts,
        }
        lease.check()
        storage.publish_file(path, config.folder("clips", "plan", generation["file"]))
    try:
        create_generation(config, lease, len(earlier), generation)
    finally:
        _remove_losers(config, len(earlier))
    logger.info(
        "planned %d videos in %d units (generation %d, %s; %d duplicates skipped)%s",
        len(order),
        sum(num_units.values()),
        len(earlier),
        kind,
        facts["duplicates"],
        f"; expecting {outputs.sum() / 1e6:.3g} MB of shards" if expected.num_videos else "",
    )


def _remove_losers(config: RunConfig, number: int) -> None:
    """Removes the rows of planners that were killed or lost, as soon as somebody's generation of this number holds."""
    folder = config.folder("clips", "plan")
    generations = read_generations(config)
    if len(generations) <= number:
        return
    for entry in storage.list_folder(folder):
        if entry.name.startswith(f"gen-{number:04d}-") and entry.name != generations[number]["file"]:
            storage.remove(storage.join(folder, entry.name))


def _repeats_file(table: pa.Table, order: np.ndarray) -> np.ndarray:
    """bool[n]: whether a video is another span of the file that the one before it is a span of."""
    repeats = np.zeros(len(order), bool)
    if table["start_seconds"].null_count + table["end_seconds"].null_count == 2 * len(table):
        return repeats
    urls = table["url"].take(pa.array(order)).combine_chunks().dictionary_encode().indices.to_numpy()
    repeats[1:] = urls[1:] == urls[:-1]
    return repeats


def _write_rows(
    path: Path,
    table: pa.Table,
    order: np.ndarray,
    is_val: np.ndarray,
    units: np.ndarray,
    ordinals: np.ndarray,
    ids: np.ndarray,
) -> None:
    schema = pa.schema(PLAN_COLUMNS)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, len(order), BATCH_ROWS):
            rows = slice(first, first + BATCH_ROWS)
            taken = table.take(pa.array(order[rows]))
            columns: dict[str, Any] = {
                "split": np.where(is_val[rows], "val", "train"),
                "unit": units[rows],
                "ordinal": ordinals[rows],
                "id": [f"{number:016x}" for number in ids[rows].tolist()],
                **{name: taken.column(name) for name in taken.column_names if name not in _OWN_COLUMNS},
            }
            writer.write_table(pa.table(columns, schema))


def _share(seed: int, group: int) -> float:
    """A number in [0, 1) that decides the split of a group, independent of the order."""
    return hash64(f"split:{seed}:{group:016x}") / 2**64


def _ints(numbers: np.ndarray) -> Iterator[int]:
    """As Python's own numbers, which are faster to compute with one by one, never many of them at once."""
    for first in range(0, len(numbers), BATCH_ROWS):
        yield from numbers[first : first + BATCH_ROWS].tolist()


def cut_units(
    sizes: np.ndarray, outputs: np.ndarray, is_val: np.ndarray, unit_bytes: int, shard_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each split, in order, into units: int32[n] unit and int32[n] ordinal in it.

    The units of a split make about equal shares of its shards, each about ``shard_bytes``, so that none is a small
    rest. A unit closes before the video that would take it beyond ``unit_bytes`` of source or `_MOST_VIDEOS`; it holds
    at least one.

    Args:
        sizes: int64[n], bytes of source to read.
        outputs: float64[n], expected bytes of shards.
        is_val: bool[n], ascending.
        unit_bytes: source in a unit, at most.
        shard_bytes: shards of a unit, about. A small data set has smaller ones, for several workers to share.
    """
    goal = min(shard_bytes, max(_LEAST_OUTPUT_BYTES, outputs.sum() / _FEWEST_UNITS))
    units, ordinals = np.empty(len(sizes), np.int32), np.empty(len(sizes), np.int32)
    for split in (False, True):
        rows = slice(*np.searchsorted(is_val, [split, split + 1]))
        total = outputs[rows].sum()
        num_shares = max(1, round(total / goal))
        middles = np.cumsum(outputs[rows]) - outputs[rows] / 2
        shares = np.minimum(middles * num_shares // (total or 1.0), num_shares - 1).astype(np.int64)
        unit = -1
        ordinal = filled = last_share = 0
        for row, size, number in zip(range(rows.start, rows.stop), _ints(sizes[rows]), _ints(shares), strict=True):
            if unit < 0 or number != last_share or filled + size > unit_bytes or ordinal == _MOST_VIDEOS:
                unit, ordinal, filled, last_share = unit + 1, 0, 0, number
            units[row], ordinals[row] = unit, ordinal
            ordinal, filled = ordinal + 1, filled + size
    return units, ordinals
