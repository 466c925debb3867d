"""Decides which listed rows are different videos."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from clipmill import storage
from clipmill.pipeline.plan import Plan, numbers_of
from clipmill.scratch import ScratchFolder

__all__ = ["NOTHING_PLANNED", "PlannedVideos", "content_of", "hash64", "is_md5", "tell_apart", "whole_md5"]

_COPY_BYTES = 2**22
_MD5 = re.compile("[0-9a-f]{32}")

logger = logging.getLogger(__name__)


def hash64(text: str) -> int:
    """The first 64 bits of a SHA-256. Written as 16 hex digits, they sort like the numbers."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_md5(etag: str | None) -> bool:
    """Whether an etag is an MD5 of the content, as for objects uploaded in one part.

    The etag of a multipart upload also depends on the sizes of the parts.
    """
    return etag is not None and _MD5.fullmatch(etag) is not None


def content_of(base_url: str, video: dict[str, Any], limits: storage.Limits) -> str:
    """A text that distinguishes videos of equal identity by content: the MD5 of the whole file, from the etag or by
    reading.

    Args:
        base_url: the folder that relative URLs refer to.
        video: source columns of the video's row.
        limits: limits of time and size for a file of a web server.
    """
    part = ":".join(str(video[column]) for column in ("member", "start_seconds", "end_seconds"))
    if video["fault"] is not None:
        return f"fault:{part}"
    if is_md5(video["etag"]):
        return f"{video['etag']}:{part}"
    try:
        return f"{whole_md5(storage.resolve(base_url, video['url']), limits)}:{part}"
    except (FileNotFoundError, storage.Unreadable, storage.Refused):
        return f"missing:{video['url']}:{part}"


@functools.lru_cache  # a file with many videos has many rows
def whole_md5(url: str, limits: storage.Limits) -> str:
    """MD5 of a whole file, read as a stream. A web server may not support ranges, so its file is copied first.

    Raises:
        FileNotFoundError: the file has vanished.
        Unreadable: a web server does not deliver it within the limits.
        Refused: the storage denies access.
    """
    if storage.is_web(url):
        with ScratchFolder("plan") as folder:
            storage.fetch(url, folder / "copy", limits)
            return whole_md5(str(folder / "copy"), limits)
    digest = hashlib.md5(usedforsecurity=False)
    with storage.open_to_read(url, _COPY_BYTES) as file:
        while block := file.read(_COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class PlannedVideos:
    """The videos of earlier generations of a plan, in 8 bytes per video.

    Attributes:
        ids: uint64[n], sorted ids of all planned videos.
        ambiguous: hashes of identities for which different contents were found.
        url: returns the URL of the planned video with an id.
    """

    ids: np.ndarray
    ambiguous: Set[int]
    url: Callable[[int], str]

    @classmethod
    def of_plan(cls, plan: Plan, recovered: np.ndarray) -> PlannedVideos:
        """The videos of all generations of a plan.

        Args:
            plan: the plan.
            recovered: uint64[n], further ids of planned videos, from `recovered_ids`.
        """
        filled = len(recovered)
        ids = np.empty(filled + sum(generation["videos"] for generation in plan.generations), np.uint64)
        ids[:filled] = recovered
        for table in plan.tables(["id"]):
            ids[filled : filled + len(table)] = numbers_of(table["id"])
            filled += len(table)
        ids.sort()
        ambiguous = {int(base, 16) for one in plan.generations for base in one.get("ambiguous", [])}
        return cls(ids, ambiguous, plan.url_of)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """bool[n]: whether each id is planned."""
        if not len(self.ids):
            return np.zeros(len(ids), bool)
        places = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return self.ids[places] == ids

    def knows(self, bases: np.ndarray) -> np.ndarray:
        """bool[n]: whether videos with these identities are planned, under any id."""
        return self.holds(bases) | np.isin(bases, np.array(sorted(self.ambiguous), np.uint64))


NOTHING_PLANNED = PlannedVideos(np.empty(0, np.uint64), frozenset(), str)


def tell_apart(
    bases: np.ndarray,
    content: Callable[[int], str],
    url: Callable[[int], str] = str,
    planned: PlannedVideos = NOTHING_PLANNED,
) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Resolves equal identities by comparing full contents.

    Args:
        bases: uint64[n], the hash of each identity.
        content: distinguishes rows of equal identity by content (`content_of`); it may read the whole file.
        url: returns the URL of a row.
        planned: the videos that are planned already.

    Returns:
        uint64[n] ids; bool[n], False for a row that repeats an earlier row's content; the hashes of identities whose
        contents differ. For these identities every id includes the content, so that ids do not depend on the order of
        the listing. Only a video that was planned before the others appeared keeps its id.
    """
    ids, keep = bases.copy(), np.ones(len(bases), bool)
    by_hash = np.argsort(bases, kind="stable")
    in_doubt = np.isin(bases[by_hash], np.array(sorted(planned.ambiguous), np.uint64))
    equal = bases[by_hash[1:]] == bases[by_hash[:-1]]
    in_doubt[1:] |= equal
    in_doubt[:-1] |= equal
    ambiguous = set()
    for base, group in groupby(by_hash[in_doubt].tolist(), key=lambda row: int(bases[row])):
        by_url: dict[str, int] = {}
        for row in group:
            keep[row] = by_url.setdefault(url(row), row) == row  # the same file again: no need to read it
        if len(by_url) == 1 and base not in planned.ambiguous:
            continue
        contents: dict[str, list[int]] = {}
        for row in by_url.values():
            contents.setdefault(content(row), []).append(row)
        for rows in contents.values():
            keep[rows[1:]] = False
        if len(contents) == 1 and base not in planned.ambiguous:
            continue
        ambiguous.add(base)
        for text, rows in contents.items():
            ids[rows[0]] = hash64(f"{base:016x}:{text}")
        if planned.holds(np.array([base], np.uint64))[0]:
            _find_planned(base, contents, url, planned, ids, keep)
    return ids, keep, ambiguous


def _find_planned(
    base: int,
    contents: dict[str, list[int]],
    url: Callable[[int], str],
    planned: PlannedVideos,
    ids: np.ndarray,
    keep: np.ndarray,
) -> None:
    """Among videos of equal identity, gives the one that is already planned its old id."""
    planned_url = planned.url(base)
    for rows in contents.values():
        if any(url(row) == planned_url for row in rows):
            ids[rows[0]] = base
            return
    # It is not known which of them is the planned one. Skip them all: a missing video is better than a duplicate.
    firsts = [rows[0] for rows in contents.values()]
    keep[firsts] = False
    logger.warning(
        "skipped %s: one of them is the planned %s, which is no longer there",
        ", ".join(storage.shown(url(row)) for row in firsts),
        storage.shown(planned_url),
    )
