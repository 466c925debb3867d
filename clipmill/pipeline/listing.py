"""What a source holds now, and which of it are different videos. Python objects live for one batch of the listing."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np
import pyarrow as pa

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import base_url, describe_files, list_videos
from clipmill.pipeline.sources.record import SourceVideo, file_identity
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import file_sha256
from clipmill.shards.manifest import SPLITS

__all__ = ["NO_SPLIT", "SOURCE_COLUMNS", "Elders", "Listing", "hash64", "list_source", "tell_apart"]

BATCH_ROWS = 2**16
NO_SPLIT = -1

logger = logging.getLogger(__name__)

_TEXT = pa.large_string()  # 32-bit offsets would overflow at some 20 million names
SOURCE_COLUMNS: dict[str, pa.DataType] = {
    "url": _TEXT,
    "bytes": pa.int64(),
    "etag": _TEXT,
    "label": _TEXT,
    "actions": _TEXT,
    "text": _TEXT,
    "member": _TEXT,
    "metadata": _TEXT,
    "start_seconds": pa.float64(),
    "end_seconds": pa.float64(),
    "sidecars": _TEXT,
    "fault": _TEXT,
}
_MD5 = re.compile("[0-9a-f]{32}")
"""The etag of an object that was put whole: it covers the content. Others (of multipart uploads, of encrypted
buckets) depend on how the object was put as well."""


@dataclass(frozen=True)
class Listing:
    """A source's listing.

    Attributes:
        table: `SOURCE_COLUMNS` of each video.
        bases: uint64[n], the hash of each identity.
        groups: uint64[n], the hash of each group: a function of it decides the split.
        places: uint64[n], the hash that orders the plan: of each identity, or of the file where videos share one that
            must be fetched whole.
        splits: int8[n], the split that the source gives each or its group (index in `SPLITS`), or `NO_SPLIT`.
        base_url: the folder that relative URLs are relative to.
        others: files of a folder that are no videos, by the ending of their names.
    """

    table: pa.Table
    bases: np.ndarray
    groups: np.ndarray
    places: np.ndarray
    splits: np.ndarray
    base_url: str
    others: Counter[str]

    def content(self, row: int) -> str:
        """What tells two videos of equal identity apart: a hash of the whole file, which is read for it."""
        (video,) = self.table.slice(row, 1).to_pylist()
        part = ":".join(str(video[column]) for column in ("member", "start_seconds", "end_seconds"))
        if video["fault"] is not None:
            return f"fault:{part}"
        url = storage.resolve(self.base_url, video["url"])
        if video["etag"] is not None and _MD5.fullmatch(video["etag"]):
            return f"{video['bytes']}:{video['etag']}:{part}"
        try:
            return f"{_whole_sha256(url)}:{part}"
        except FileNotFoundError:
            return f"missing:{video['url']}:{part}"


def list_source(source: SourceConfig) -> Listing:
    """Lists a source once, in a stream.

    Raises:
        UserError: the source is missing, empty or unreadable, or puts videos of one group into different splits.
    """
    others: Counter[str] = Counter()
    base = base_url(source)
    identified = _identified(list_videos(source, others), base)
    schema = pa.schema(SOURCE_COLUMNS)
    hashes, splits = [np.empty((0, 3), np.uint64)], [np.empty(0, np.int8)]
    chunks: dict[str, list[pa.Array]] = {field.name: [pa.array([], field.type)] for field in schema}
    while batch := list(islice(identified, BATCH_ROWS)):
        listed = [video for video, _ in batch]
        hashes.append(np.array([_hashes(*one) for one in batch], np.uint64))
        splits.append(np.array([SPLITS.index(v.split) if v.split else NO_SPLIT for v in listed], np.int8))
        for name, kind in SOURCE_COLUMNS.items():
            attribute = "name" if name == "url" else name
            chunks[name].append(pa.array([getattr(video, attribute) for video in listed], kind))
    bases, groups, places = np.concatenate(hashes).T.copy()
    # One after the other, each freed before the next: the listing is never in memory twice.
    table = pa.table([pa.concat_arrays(chunks.pop(name)) for name in SOURCE_COLUMNS], schema)
    if others:
        logger.info("skipped what is no video: %s", describe_files(others))
    listing = Listing(table, bases, groups, places, np.concatenate(splits), base, others)
    _spread_splits(listing)
    return listing


def _hashes(video: SourceVideo, identity: str) -> tuple[int, int, int]:
    """Of the video's identity (that of its file, with the span where it has one), of its group, and of its place."""
    whole = hash64(identity)
    group = whole if video.group is None else hash64(video.group)
    is_span = video.start_seconds is not None or video.end_seconds is not None
    base = hash64(f"{identity}:{video.start_seconds}:{video.end_seconds}") if is_span else whole
    return base, group, whole if video.together is None else hash64(video.together)


def _spread_splits(listing: Listing) -> None:
    """Gives all videos of a group the split that the source gives some of them.

    Raises:
        UserError: the source gives them different ones.
    """
    given = np.flatnonzero(listing.splits != NO_SPLIT)
    if not len(given):
        return
    groups, firsts = np.unique(listing.groups[given], return_index=True)
    firsts = given[firsts]
    places = np.searchsorted(groups, listing.groups).clip(max=len(groups) - 1)
    is_given = groups[places] == listing.groups
    differs = np.flatnonzero(
        is_given & (listing.splits != NO_SPLIT) & (listing.splits != listing.splits[firsts[places]])
    )
    if len(differs):
        one, other = firsts[places[differs[0]]], differs[0]
        (first, first_split), (second, second_split) = (
            (listing.table["url"][row].as_py(), SPLITS[listing.splits[row]]) for row in (int(one), int(other))
        )
        raise UserError(
            f"{first} and {second} are of one group, but the source puts the one into {first_split} and the other into "
            f"{second_split} ({len(differs)} videos differ so from the first of their group); give each group one split"
        )
    listing.splits[is_given] = listing.splits[firsts[places[is_given]]]


def _identified(videos: Iterator[SourceVideo], base: str) -> Iterator[tuple[SourceVideo, str]]:
    """Videos with the identities of their files; one that cannot be read has a fault, one that vanished is skipped."""
    for video in videos:
        try:
            identity = video.identity or file_identity(storage.resolve(base, video.name), video.bytes, video.etag)
        except FileNotFoundError:
            logger.warning("%s vanished while the source was listed", video.name)
            continue
        except OSError as error:
            identity = f"fault:{video.name}"
            video = replace(video, fault=f"{video.name} cannot be read: {error.strerror or error}")
        yield video, identity


def hash64(text: str) -> int:
    """The first 64 bits of a SHA-256; as 16 hex digits they sort as the numbers do."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@functools.lru_cache  # a file of many videos stands in many rows
def _whole_sha256(url: str) -> str:
    if storage.is_local(url):
        return file_sha256(storage.local_path(url))
    with ScratchFolder("plan") as folder:
        path = folder / "video"
        storage.fetch(url, path)
        return file_sha256(path)


@dataclass(frozen=True)
class Elders:
    """What earlier generations of a plan know.

    Attributes:
        ids: uint64[n], sorted: of all planned videos.
        ambiguous: hashes of identities behind which different contents were found.
        url: of the planned video with this id.
    """

    ids: np.ndarray
    ambiguous: Set[int]
    url: Callable[[int], str]

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """bool[n]: whether these are planned."""
        if not len(self.ids):
            return np.zeros(len(ids), bool)
        places = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return self.ids[places] == ids


NO_ELDERS = Elders(np.empty(0, np.uint64), frozenset(), str)


def tell_apart(
    bases: np.ndarray, content: Callable[[int], str], url: Callable[[int], str] = str, elders: Elders = NO_ELDERS
) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Resolves equal identities by full content.

    Args:
        bases: uint64[n], the hash of each identity.
        content: what tells two rows of equal identity apart (reads the whole file).
        url: of a row.
        elders: what is planned already.

    Returns:
        uint64[n] ids; bool[n] False for a row that repeats an earlier row's content; the hashes of identities behind
        which contents differ. There every id is refined, so that ids do not depend on the order of the listing. Only a
        video that was planned before its look-alikes came keeps the id that it has.
    """
    ids, keep = bases.copy(), np.ones(len(bases), bool)
    by_hash = np.argsort(bases, kind="stable")
    in_doubt = np.isin(bases[by_hash], np.array(sorted(elders.ambiguous), np.uint64))
    equal = bases[by_hash[1:]] == bases[by_hash[:-1]]
    in_doubt[1:] |= equal
    in_doubt[:-1] |= equal
    ambiguous = set()
    for base, group in groupby(by_hash[in_doubt].tolist(), key=lambda row: int(bases[row])):
        by_url: dict[str, int] = {}
        for row in group:
            keep[row] = by_url.setdefault(url(row), row) == row  # the same file again: nothing to read
        if len(by_url) == 1 and base not in elders.ambiguous:
            continue
        contents: dict[str, list[int]] = {}
        for row in by_url.values():
            contents.setdefault(content(row), []).append(row)
        for rows in contents.values():
            keep[rows[1:]] = False
        if len(contents) == 1 and base not in elders.ambiguous:
            continue
        ambiguous.add(base)
        for text, rows in contents.items():
            ids[rows[0]] = hash64(f"{base:016x}:{text}")
        if elders.holds(np.array([base], np.uint64))[0]:
            _find_elder(base, contents, url, elders, ids, keep)
    return ids, keep, ambiguous


def _find_elder(
    base: int,
    contents: dict[str, list[int]],
    url: Callable[[int], str],
    elders: Elders,
    ids: np.ndarray,
    keep: np.ndarray,
) -> None:
    """Among look-alikes, gives the one that is planned under their common hash its id back."""
    planned_url = elders.url(base)
    for rows in contents.values():
        if any(url(row) == planned_url for row in rows):
            ids[rows[0]] = base
            return
    # Which of them is the planned one cannot be known: rather leave out a video than have one twice.
    firsts = [rows[0] for rows in contents.values()]
    keep[firsts] = False
    logger.warning(
        "left out %s: one of them is the planned %s, which is no longer there", ", ".join(map(url, firsts)), planned_url
    )
