"""Which listed rows are different videos."""

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
    """The first 64 bits of a SHA-256; as 16 hex digits they sort as the numbers do."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_md5(etag: str | None) -> bool:
    """Whether an etag covers the content: that of an object that was put whole.

    Those of multipart uploads depend on how the object was put as well.
    """
    return etag is not None and _MD5.fullmatch(etag) is not None


def content_of(base_url: str, video: dict[str, Any], limits: storage.Limits) -> str:
    """What tells two videos of equal identity apart: the MD5 of the whole file, which is read where no etag is one.

    Args:
        base_url: the folder that relative URLs are relative to.
        video: source columns of its row.
        limits: of what a web server may take and send.
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


@functools.lru_cache  # a file of many videos stands in many rows
def whole_md5(url: str, limits: storage.Limits) -> str:
    """Hash of all bytes of a file, read as a stream; that of a web server, which may know no ranges, as a copy.

    Raises:
        FileNotFoundError: it has vanished.
        Unreadable: a web server does not give it within the limits.
        Refused: storage refuses it.
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
    """What earlier generations of a plan know: 8 bytes a video.

    Attributes:
        ids: uint64[n], sorted: of all planned videos.
        ambiguous: hashes of identities behind which different contents were found.
        url: of the planned video with this id.
    """

    ids: np.ndarray
    ambiguous: Set[int]
    url: Callable[[int], str]

    @classmethod
    def of_plan(cls, plan: Plan, recovered: np.ndarray) -> PlannedVideos:
        """Of all generations of a plan.

        Args:
            plan: it.
            recovered: uint64[n], more ids of planned videos.
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
        """bool[n]: whether these are planned."""
        if not len(self.ids):
            return np.zeros(len(ids), bool)
        places = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return self.ids[places] == ids

    def knows(self, bases: np.ndarray) -> np.ndarray:
        """bool[n]: whether videos of these identities are planned, under whichever id."""
        return self.holds(bases) | np.isin(bases, np.array(sorted(self.ambiguous), np.uint64))


NOTHING_PLANNED = PlannedVideos(np.empty(0, np.uint64), frozenset(), str)


def tell_apart(
    bases: np.ndarray,
    content: Callable[[int], str],
    url: Callable[[int], str] = str,
    planned: PlannedVideos = NOTHING_PLANNED,
) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Resolves equal identities by full content.

    Args:
        bases: uint64[n], the hash of each identity.
        content: what tells two rows of equal identity apart (reads the whole file).
        url: of a row.
        planned: what is planned already.

    Returns:
        uint64[n] ids; bool[n] False for a row that repeats an earlier row's content; the hashes of identities behind
        which contents differ. There every id is refined, so that ids do not depend on the order of the listing. Only a
        video that was planned before its look-alikes came keeps the id that it has.
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
            keep[row] = by_url.setdefault(url(row), row) == row  # the same file again: nothing to read
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
    """Among look-alikes, gives the one that is planned under their common hash its id back."""
    planned_url = planned.url(base)
    for rows in contents.values():
        if any(url(row) == planned_url for row in rows):
            ids[rows[0]] = base
            return
    # Which of them is the planned one cannot be known: rather leave out a video than have one twice.
    firsts = [rows[0] for rows in contents.values()]
    keep[firsts] = False
    logger.warning(
        "left out %s: one of them is the planned %s, which is no longer there",
        ", ".join(storage.shown(url(row)) for row in firsts),
        storage.shown(planned_url),
    )
