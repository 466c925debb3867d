"""Removes files that killed writers left behind. Files named by a commit record stay, even with concurrent writers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from clipmill import storage
from clipmill.lease import Lease, hold
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import read_parts, unit_of
from clipmill.shards.format import INDEX_SUFFIX
from clipmill.shards.manifest import SPLITS
from clipmill.shards.verify import find_orphans, named_shards

__all__ = ["prune", "stage_folder"]

logger = logging.getLogger(__name__)


def stage_folder(url: str) -> str:
    """The folder whose lease covers a data set: the folder of the stage, which writes both splits."""
    parent, _, name = url.rstrip("/").rpartition("/")
    return parent if name in SPLITS else url


def prune(url: str, orphans: Sequence[str], grace_seconds: float) -> list[str]:
    """Removes orphans that are older than a grace period, and returns their names.

    Holds the lease of the stage, so that no run works on the data set. A worker of a run that lost its lease may still
    commit. Therefore each orphan is checked again before it is removed, and is put back if a record names it
    afterwards. A file of unknown age stays.

    Args:
        url: the data set's folder.
        orphans: names from a `VerifyReport`.
        grace_seconds: minimum age; must exceed the time from a writer's first put to its commit record.

    Raises:
        UserError: a run is using the data set, or a commit record of it is damaged.
    """
    if not orphans:
        return []
    with hold(stage_folder(url), "verify --prune") as lease, ScratchFolder("prune") as folder:
        still = set(orphans) & set(find_orphans(url, named_shards(url)))
        oldest = time.time() - grace_seconds
        found = [entry for entry in storage.walk(url) if entry.name in still]
        old = [entry.name for entry in found if entry.modified is not None and entry.modified < oldest]
        return [name for name in old if _remove(url, name, lease, oldest, folder / "copy")]


def _remove(url: str, name: str, lease: Lease, oldest: float, copy: Path) -> bool:
    """Removes one orphan unless a commit record names it by now. Returns whether it was removed."""
    orphan_url = storage.join(url, name)
    try:
        storage.fetch(orphan_url, copy)
        modified = storage.stat(orphan_url).modified
    except FileNotFoundError:
        return False
    if modified is None or modified >= oldest or _is_committed(url, name):
        return False
    lease.check()
    storage.remove(orphan_url)
    if _is_committed(url, name):
        storage.publish_file(copy, orphan_url)
        logger.warning("put %s back: it was committed while it was removed", orphan_url)
        return False
    logger.info("removed %s, which no commit names", orphan_url)
    return True


def _is_committed(url: str, name: str) -> bool:
    """Whether the commit record of a file's unit names the file."""
    unit = unit_of(name)
    if unit is None:
        return False
    try:
        return any(name in (part.name, part.name + INDEX_SUFFIX) for part in read_parts(url, unit))
    except FileNotFoundError:
        return False
