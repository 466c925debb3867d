"""Commit records: the shards of each finished unit of a data set.

A data set folder holds immutable tars, their indexes, and ``commits/000012.json`` for each finished unit. A writer puts
the objects of a unit first and creates the record last, exclusively. If two writers finish the same unit, one record
wins, and it names only complete objects of its own writer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.format import INDEX_SUFFIX, Part, file_sha256

__all__ = [
    "SCHEMA",
    "SHA256",
    "ShardEntry",
    "commit_unit",
    "committed_units",
    "damage_of",
    "entry_of",
    "is_count",
    "publish_part",
    "read_commit",
    "read_commits",
    "read_parts",
    "restore_unit",
    "unit_of",
]

SCHEMA = 2
"""Schema version of commit records and manifests."""
NUM_READERS = 16
"""Commit records read at once; a bucket answers each after about 20 ms."""
READ_AHEAD = 256
"""Records that are read ahead of their consumer. Each lists all videos of its unit, so this bounds the memory."""
_RECORD_NAME = re.compile(r"(\d{6,})\.json")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.tar")
_UNIT = re.compile(r"[a-z]+-(\d{6,9})-")
SHA256 = re.compile("[0-9a-f]{64}")
"""A SHA-256 in hex, as documents hold it."""


class ShardEntry(NamedTuple):
    """One shard of a data set, as commit records and manifests name it.

    A tuple, because a training makes and pickles up to about 100,000 of them before its first step.
    """

    name: str
    """Relative to the data set's folder."""
    bytes: int
    sha256: str
    index_sha256: str
    """SHA-256 of ``NAME.idx``."""
    samples: int

    @classmethod
    def parse(cls, fields: Any) -> ShardEntry:
        """Parses an entry of an untrusted document. It is checked because name and hashes become parts of paths.

        Raises:
            ValueError: the name is not one of a file in the data set's folder, or a hash or count is invalid.
        """
        try:
            entry = cls(**fields)
        except TypeError as error:
            raise ValueError("the fields of a shard are not those of this format") from error
        if not (isinstance(entry.name, str) and _SHARD_NAME.fullmatch(entry.name)):
            raise ValueError(f"{entry.name!r:.80} is not the name of a shard")
        for sha256 in (entry.sha256, entry.index_sha256):
            if not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
                raise ValueError(f"{sha256!r:.80}, of {entry.name}, is not a SHA-256")
        for count in (entry.bytes, entry.samples):
            if not is_count(count):
                raise ValueError(f"{count!r:.80}, of {entry.name}, is not a number of bytes or samples")
        return entry

    @property
    def index_name(self) -> str:
        """Name of its index file, in the same folder."""
        return self.name + INDEX_SUFFIX


def is_count(value: Any) -> bool:
    """Whether a value of a document is a count small enough that sums over a data set fit into int64."""
    return type(value) is int and 0 <= value < 2**48


def _record_url(url: str, unit: int) -> str:
    return storage.join(url, "commits", f"{unit:06d}.json")


def commit_unit(
    url: str, unit: int, parts: Sequence[Part], body: dict[str, Any], *, are_published: bool = False
) -> dict[str, Any]:
    """Publishes the shards of a finished unit and commits them. A unit without samples is committed too.

    Args:
        url: the data set's folder.
        unit: number of the unit in the plan.
        parts: the result of `UnitWriter.finish`.
        body: JSON facts of the stage to keep in the record (exclusions, videos, versions), in addition to ``unit`` and
            ``parts``.
        are_published: whether `publish_part` has published all parts already.

    Returns:
        The valid record: that of the first writer. The shards of other writers remain as orphans.

    Raises:
        ValueError: ``body`` has a key of the record itself.
    """
    if not storage.exists(_record_url(url, unit)):
        record = _record(unit, parts, body)
        for part in () if are_published else parts:
            publish_part(url, part)
        storage.create_document(_record_url(url, unit), record, SCHEMA)
    return read_commit(url, unit)


def restore_unit(url: str, unit: int, parts: Sequence[Part], body: dict[str, Any]) -> dict[str, Any]:
    """Publishes the shards of a committed unit again, and its record if it is missing, damaged or names other shards.

    Args:
        url: the data set's folder.
        unit: number of the unit in the plan.
        parts: shards with the names and hashes that the unit had.
        body: as for `commit_unit`.

    Returns:
        The valid record.
    """
    for part in parts:
        publish_part(url, part)
    record = _record(unit, parts, body)
    try:
        is_whole = read_commit(url, unit)["parts"] == record["parts"]
    except (FileNotFoundError, UserError):
        is_whole = False
    if not is_whole:
        storage.publish_document(_record_url(url, unit), record, SCHEMA)
    return read_commit(url, unit)


def publish_part(url: str, part: Part) -> None:
    """Publishes a shard and its index in a data set's folder. They are orphans until their unit is committed."""
    storage.publish_file(part.path, storage.join(url, part.name))
    storage.publish_file(part.index_path, storage.join(url, part.name + INDEX_SUFFIX))


def _record(unit: int, parts: Sequence[Part], body: dict[str, Any]) -> dict[str, Any]:
    if taken := body.keys() & {"schema", "unit", "parts"}:
        raise ValueError(f"the body of a commit record cannot have the keys {sorted(taken)}")
    return {"unit": unit, "parts": [entry_of(part)._asdict() for part in parts], **body}


def entry_of(part: Part) -> ShardEntry:
    """The entry of a finished shard for commit records and manifests."""
    return ShardEntry(part.name, part.bytes, part.sha256, file_sha256(part.index_path), part.samples)


def committed_units(url: str) -> list[int]:
    """Numbers of the committed units, ascending. Takes one listing and reads no record."""
    names = (_RECORD_NAME.fullmatch(entry.name) for entry in storage.list_folder(storage.join(url, "commits")))
    return sorted(int(name[1]) for name in names if name)


def read_commit(url: str, unit: int) -> dict[str, Any]:
    """The commit record of a unit: ``unit``, ``parts`` (fields of `ShardEntry`) and the stage's own keys.

    Raises:
        FileNotFoundError: the unit is not committed.
        UserError: its record is damaged, or has a newer schema.
    """
    document = storage.read_document(_record_url(url, unit), SCHEMA)
    try:
        if document["unit"] != unit:
            raise ValueError(f"it is of unit {document['unit']!r:.80}")
        for part in document["parts"]:
            ShardEntry.parse(part)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{_record_url(url, unit)} is damaged ({damage_of(error)}); restore it, or run `clipmill verify --repair`"
        ) from error
    return document


def read_parts(url: str, unit: int) -> tuple[ShardEntry, ...]:
    """The shards of a committed unit.

    Raises:
        FileNotFoundError: the unit is not committed.
        UserError: its record is damaged, or has a newer schema.
    """
    return tuple(map(ShardEntry.parse, read_commit(url, unit)["parts"]))


def unit_of(name: str) -> int | None:
    """The unit number in the name of a shard or its index; None if the name has none."""
    found = _UNIT.match(name)
    return int(found[1]) if found else None


def read_commits(url: str, units: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the commit records of ``units`` in their order; several are read at once.

    Raises:
        FileNotFoundError: one of them is not committed.
    """
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for first in range(0, len(units), READ_AHEAD):
            yield from readers.map(lambda unit: read_commit(url, unit), units[first : first + READ_AHEAD])


def damage_of(error: Exception) -> str:
    """Describes the damage of a document from the error that its parsing raised."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
