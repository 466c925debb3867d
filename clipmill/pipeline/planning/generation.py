"""Makes the generations of a plan: the first from a listing, later ones from new or quarantined videos.

A generation is planned once. Its rows are written first, under a name with their hash, and its document is created
last. A planner that is killed, or that loses against another one, leaves the plan unchanged.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.lease import Lease
from clipmill.pipeline.fetch import fetch_limits
from clipmill.pipeline.plan import GenerationKind, Plan, create_generation, load_plan, numbers_of, read_generations
from clipmill.pipeline.planning.conditions import check_conditions
from clipmill.pipeline.planning.identity import NOTHING_PLANNED, PlannedVideos, content_of, hash64, tell_apart
from clipmill.pipeline.planning.listed import GivenSplits, ListedVideos
from clipmill.pipeline.planning.listing import LISTED_COLUMNS, list_rows, with_hashes
from clipmill.pipeline.planning.moved import (
    UnknownFiles,
    has_file_identity,
    identity_covers_content,
    listed_files,
    planned_files,
)
from clipmill.pipeline.planning.progress import Progress
from clipmill.pipeline.planning.recovered import recheck_rows, recovered_ids
from clipmill.pipeline.planning.spool import Spool
from clipmill.pipeline.planning.units import Draft, write_units
from clipmill.pipeline.planning.yields import Yield, measure_yield
from clipmill.pipeline.sources import base_url
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import file_sha256
from clipmill.shards.manifest import SPLITS

__all__ = ["extend_plan", "make_plan", "retry_videos", "split_share"]

logger = logging.getLogger(__name__)

_ENDINGS_KEPT = 100
"""Number of file extensions that the plan keeps in its counts of other files."""


def make_plan(config: RunConfig, lease: Lease) -> Plan:
    """Lists the source once and publishes the plan.

    Raises:
        UserError: the source is missing, empty or unreadable, or its videos lack the prior's condition. Nothing has
            been written.
        StageFailed: another run owns the folder, or has planned meanwhile. Its plan stays unchanged.
    """
    _add_listed(config, lease, None)
    return load_plan(config)


def extend_plan(config: RunConfig, lease: Lease, plan: Plan) -> bool:
    """Lists the source again and plans the videos that no generation has. Returns False if there are none.

    Raises:
        UserError: the source is missing, empty or unreadable. Nothing has been written.
        StageFailed: another run owns the folder, or has planned meanwhile. Its plan stays unchanged.
    """
    return _add_listed(config, lease, plan)


def retry_videos(config: RunConfig, lease: Lease, plan: Plan, ids: Collection[str]) -> bool:
    """Plans videos of earlier generations again, in new units. Returns False if there are none.

    Files that could not be read when they were listed are checked again.

    Raises:
        StageFailed: another run owns the folder, or has planned meanwhile. Its plan stays unchanged.
    """
    wanted = np.array([int(one, 16) for one in ids], np.uint64)
    with ScratchFolder("plan") as folder:
        rows = Spool(folder / "rows", "place")
        for table in plan.tables():
            numbers = numbers_of(table["id"])
            table = table.append_column("place", pa.array(numbers))
            rows.add(table.filter(pa.array(np.isin(numbers, wanted))))
        if not rows.num_rows:
            return False
        planned = PlannedVideos.of_plan(plan, recovered_ids(plan))
        draft = Draft(folder / "draft")
        with draft:
            for table in rows.ranges():
                _, firsts = np.unique(table["place"].to_numpy(), return_index=True)  # a video may have failed twice
                chosen = recheck_rows(table.take(pa.array(firsts)), base_url(config.data.source), planned)
                for split in SPLITS:
                    draft.add(split, chosen.filter(pc.equal(chosen["split"], split)))
        known = Yield.of_generation(plan.generations[-1])
        _publish(config, lease, plan, "retried", draft, known, {"duplicates": 0}, folder)
    return True


def _add_listed(config: RunConfig, lease: Lease, plan: Plan | None) -> bool:
    planned = NOTHING_PLANNED if plan is None else PlannedVideos.of_plan(plan, recovered_ids(plan))
    others: Counter[str] = Counter()
    with ScratchFolder("plan") as folder:
        progress = Progress(config, lease, 0 if plan is None else len(plan.generations), folder / "progress")
        listed = _list(config, plan, planned, progress, others, folder)
        draft, num_repeated, ambiguous = _draft(config, listed, planned, folder)
        check_conditions(config, draft.tables(*SPLITS))
        num_videos = sum(draft.num_videos.values())
        if plan is None or num_videos:
            num_known_duplicates = 0 if plan is None else plan.num_duplicates
            facts = {
                "duplicates": max(num_repeated - num_known_duplicates, 0),
                "ambiguous": sorted(f"{base:016x}" for base in ambiguous),
                "other_files": dict(others.most_common(_ENDINGS_KEPT)),
            }
            found = measure_yield(config, draft.tables(*SPLITS), sum(draft.num_bytes.values()))
            _publish(config, lease, plan, "listed", draft, found, facts, folder)
        progress.remove()
    return num_videos > 0


def _list(
    config: RunConfig, plan: Plan | None, planned: PlannedVideos, progress: Progress, others: Counter[str], folder: Path
) -> ListedVideos:
    """All videos of the source. Videos of moved files get the identity that is planned."""
    source, base = config.data.source, base_url(config.data.source)
    listed = ListedVideos(folder / "listed")
    unknown_files = UnknownFiles(folder / "unknown_files", base, fetch_limits(config.data))
    for table in list_rows(source, progress, others):
        table = with_hashes(table)
        is_known = identity_covers_content(table, base) if plan is None else planned.knows(table["base"].to_numpy())
        is_strange = has_file_identity(table) & ~is_known
        unknown_files.add(table.filter(pa.array(is_strange)).select(list(LISTED_COLUMNS)))
        listed.add(table.filter(pa.array(~is_strange)))
    if len(unknown_files):
        known = (
            listed_files(unknown_files, listed.ranges(), base)
            if plan is None
            else planned_files(unknown_files, plan, config)
        )
        unknown_files.add_known(known)
        for table in unknown_files.recognized():
            listed.add(with_hashes(table))
    return listed


def _draft(
    config: RunConfig, listed: ListedVideos, planned: PlannedVideos, folder: Path
) -> tuple[Draft, int, set[int]]:
    """The unplanned videos in order; the number of repeated rows; the identities with several contents."""
    base = base_url(config.data.source)
    given = listed.given_splits()
    draft = Draft(folder / "draft")
    num_repeated, ambiguous = 0, set()
    with draft:
        for table in listed.ranges():
            ids, keep, in_doubt = _tell_apart(table, base, fetch_limits(config.data), planned)
            num_repeated += int(len(keep) - keep.sum())
            ambiguous |= in_doubt
            rows = np.flatnonzero(keep & ~planned.holds(ids))
            rows = rows[np.lexsort((ids[rows], table["place"].to_numpy()[rows]))]
            chosen = table.take(pa.array(rows))
            chosen = chosen.append_column("id", pa.array([f"{number:016x}" for number in ids[rows].tolist()]))
            is_val = _is_val(config, chosen, given)
            for split in SPLITS:
                draft.add(split, chosen.filter(pa.array(is_val == (split == "val"))))
    return draft, num_repeated, ambiguous


def _tell_apart(
    table: pa.Table, base: str, limits: storage.Limits, planned: PlannedVideos
) -> tuple[np.ndarray, np.ndarray, set[int]]:
    def content(row: int) -> str:
        return content_of(base, table.slice(row, 1).to_pylist()[0], limits)

    def url(row: int) -> str:
        return table["url"][row].as_py()

    return tell_apart(table["base"].to_numpy(), content, url, planned)


def _is_val(config: RunConfig, table: pa.Table, given: GivenSplits) -> np.ndarray:
    """bool[n]: whether each video is in val: the source's split, else by a hash of the origin, which new videos never
    change.
    """
    origins = table["origin"].to_numpy()
    shares = (split_share(config.seed, origin) for origin in origins.tolist())
    is_val = np.fromiter((share < config.data.val_fraction for share in shares), bool, len(origins))
    return given.apply(origins, is_val)


def split_share(seed: int, origin: int) -> float:
    """A number in [0, 1) that decides the split of an origin; independent of the plan's order."""
    return hash64(f"split:{seed}:{origin:016x}") / 2**64


def _publish(
    config: RunConfig,
    lease: Lease,
    plan: Plan | None,
    kind: GenerationKind,
    draft: Draft,
    expected: Yield,
    facts: dict[str, Any],
    folder: Path,
) -> None:
    """Writes a new generation.

    Args:
        config: config of the run.
        lease: lease on the run's clips.
        plan: the generations so far; None for the first one.
        kind: kind of the generation.
        draft: its videos.
        expected: the expected bytes of shards.
        facts: further fields of its document.
        folder: scratch folder.
    """
    path = folder / "rows.parquet"
    num_units, output_bytes = write_units(
        path,
        draft,
        expected,
        config.data.clip,
        unit_bytes=config.data.unit_bytes,
        shard_bytes=config.data.shard_bytes,
        first_units={split: 0 if plan is None else plan.num_units(split) for split in SPLITS},
    )
    number = 0 if plan is None else len(plan.generations)
    sha256 = file_sha256(path)
    generation = {
        "kind": kind,
        "file": f"gen-{number:04d}-{sha256[:8]}.parquet",
        "sha256": sha256,
        "videos": sum(draft.num_videos.values()),
        "bytes": sum(draft.num_bytes.values()),
        "units": num_units,
        "base_url": storage.shown(base_url(config.data.source)),
        "yield": expected.document,
        **facts,
    }
    lease.check()
    storage.publish_file(path, config.folder("clips", "plan", generation["file"]))
    try:
        create_generation(config, lease, number, generation)
    finally:
        _remove_unused_rows(config, number)
    logger.info(
        "planned %d videos in %d units (generation %d, %s; %d duplicates skipped)%s",
        generation["videos"],
        sum(num_units.values()),
        number,
        kind,
        facts["duplicates"],
        f"; expecting {output_bytes / 1e6:.3g} MB of shards" if expected.num_videos else "",
    )


def _remove_unused_rows(config: RunConfig, number: int) -> None:
    """Removes rows that killed or losing planners left, once a generation of this number exists."""
    folder = config.folder("clips", "plan")
    generations = read_generations(config)
    if len(generations) <= number:
        return
    for entry in storage.list_folder(folder):
        if entry.name.startswith(f"gen-{number:04d}-") and entry.name != generations[number]["file"]:
            storage.remove(storage.join(folder, entry.name))
