"""Commit records, and the manifest that freezes them into a data set.

A data set folder holds immutable tars and their indexes, ``commits/000012.json`` for each unit that is done, and, once
all are, ``shards.txt`` (the tars' names, for any WebDataset reader) and ``manifest.json``. Writers of a unit put their
objects first and create the record last, exclusively: of two writers one record wins, and it names whole objects of
its own. Readers trust the manifest only. Names are relative and the fingerprint leaves the folder out, so a copied
data set is the same data set.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from clipmill import storage
from clipmill.config import fingerprint
from clipmill.errors import UserError
from clipmill.shards.format import INDEX_SUFFIX, Part, file_sha256
from clipmill.shards.interop import publish_changed, shard_lists

__all__ = [
    "SHA256",
    "SPLITS",
    "Kind",
    "Manifest",
    "ShardEntry",
    "commit_unit",
    "committed_units",
    "entry_of",
    "freeze",
    "is_count",
    "publish_part",
    "read_commit",
    "read_commits",
    "read_parts",
    "restore_unit",
    "unit_of",
]

SCHEMA = 2
"""Of commit records and manifests."""
SPLITS = ("train", "val")
"""The data sets, side by side in one folder, of a stage that keeps what is trained on apart from what judges it."""
NUM_READERS = 16
"""Commit records that are read at once: a bucket answers each after some 20 ms."""
READ_AHEAD = 256
"""Records that may wait for their consumer: each lists all videos of its unit."""
_RECORD_NAME = re.compile(r"(\d{6,})\.json")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.tar")
_UNIT = re.compile(r"[a-z]+-(\d{6,9})-")
SHA256 = re.compile("[0-9a-f]{64}")
"""In hex, as documents have it."""

Kind = Literal["clips", "tokens", "samples"]
_MADE_BY: dict[Kind, str] = {"clips": "shard", "tokens": "tokenize", "samples": "sample"}
_COUNTED_FACTS = {"num_units", "num_videos", "num_generations", "num_clips", "exclusions"}


class ShardEntry(NamedTuple):
    """One shard of a data set, as commit records and manifests name it.

    A tuple, because a training makes and pickles up to some 100,000 of them before its first step.
    """

    name: str
    """Relative to the data set's folder."""
    bytes: int
    sha256: str
    index_sha256: str
    """Of ``NAME.idx``."""
    samples: int

    @classmethod
    def parse(cls, fields: Any) -> ShardEntry:
        """An entry of a document that somebody else may have written: its name and hashes become parts of paths.

        Raises:
            ValueError: a name is no name in the data set's folder, a hash no hash, or a count no count.
        """
        try:
            entry = cls(**fields)
        except TypeError as error:
            raise ValueError("the fields of a shard are not those of this format") from error
        if not (isinstance(entry.name, str) and _SHARD_NAME.fullmatch(entry.name)):
            raise ValueError(f"{entry.name!r:.80} is no name of a shard")
        for sha256 in (entry.sha256, entry.index_sha256):
            if not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
                raise ValueError(f"{sha256!r:.80}, of {entry.name}, is no SHA-256")
        for count in (entry.bytes, entry.samples):
            if not is_count(count):
                raise ValueError(f"{count!r:.80}, of {entry.name}, is no number of bytes or samples")
        return entry

    @property
    def index_name(self) -> str:
        """Of its index, which lies beside it."""
        return self.name + INDEX_SUFFIX


def is_count(value: Any) -> bool:
    """Whether a value of a document is a count that int64 holds, sums over a data set included."""
    return type(value) is int and 0 <= value < 2**48


@dataclass(frozen=True)
class Manifest:
    """A frozen data set."""

    url: str
    """The folder it was loaded from; no part of its identity."""
    kind: Kind
    shards: tuple[ShardEntry, ...]
    num_samples: int
    fingerprint: str
    """SHA-256 (hex) over kind, recipe, and the shards' names, hashes and counts."""
    recipe: dict[str, Any]
    """How the samples were made: equal recipes and inputs give equal samples."""
    facts: dict[str, Any]
    """What readers want to know and identity does not depend on: class names, pixel statistics, versions."""

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard: int64 [num_shards]."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @property
    def clips_per_video(self) -> float:
        """How many samples on average are of one video, and lie next to each other; 1 where that is not known."""
        num_videos = self.facts.get("num_videos")
        return max(1.0, self.num_samples / num_videos) if num_videos else 1.0

    def units(self) -> dict[int, tuple[ShardEntry, ...]]:
        """The shards of each unit, by its number; those of a unit without samples are none."""
        found: dict[int, list[ShardEntry]] = {unit: [] for unit in range(self.facts.get("num_units") or 0)}
        for shard in self.shards:
            if (unit := unit_of(shard.name)) is not None:
                found.setdefault(unit, []).append(shard)
        return {unit: tuple(shards) for unit, shards in found.items()}

    @staticmethod
    def load(url: str, kind: Kind | None = None) -> Manifest:
        """Reads ``manifest.json`` of a data set folder that is to hold ``kind``; None: whatever it holds.

        Raises:
            FileNotFoundError: there is none, the data set is not finished.
            UserError: it is damaged, of a newer schema, or holds something else than ``kind``.
        """
        document_url = storage.join(url, "manifest.json")
        with _garbage_collection_paused():
            document = storage.read_document(document_url, SCHEMA)
            try:
                manifest = _parse_manifest(url, document)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{document_url} is damaged ({_cause(error)}); restore it, or remove it and run the data set's "
                    "stage again"
                ) from error
        if kind is not None and manifest.kind != kind:
            raise UserError(f"{url} holds {manifest.kind}, not {kind}; name a folder of {kind}")
        return manifest

    @staticmethod
    def require(url: str, kind: Kind, advice: str = "with this config first") -> Manifest:
        """As ``load``, of a data set that a stage needs.

        Args:
            url: its folder.
            kind: what it is to hold.
            advice: how to run the stage that makes it.

        Raises:
            UserError: also where it has not been made yet.
        """
        try:
            return Manifest.load(url, kind)
        except FileNotFoundError as error:
            raise UserError(f"no {kind} at {url}; run `clipmill {_MADE_BY[kind]}` {advice}") from error


def _parse_manifest(url: str, document: dict[str, Any]) -> Manifest:
    """A manifest, checked.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: it is none.
    """
    shards = tuple(ShardEntry.parse(entry) for entry in document["shards"])
    if document["kind"] not in _MADE_BY:
        raise ValueError(f"it holds {document['kind']!r:.80}")
    recipe, facts = document["recipe"], document["facts"]
    if not (isinstance(recipe, dict) and isinstance(facts, dict)):
        raise ValueError("its recipe or facts are no object")
    for name in _COUNTED_FACTS & facts.keys():
        if facts[name] is not None and not is_count(facts[name]):
            raise ValueError(f"its {name} is {facts[name]!r:.80}")
    if facts.get("num_units") not in (None, len(document["units"])):  # readers count up to it
        raise ValueError(f"its num_units is {facts['num_units']}, it names {len(document['units'])} units")
    manifest = _manifest(url, document["kind"], shards, recipe, facts)
    if manifest.fingerprint != document["fingerprint"]:
        raise ValueError("its content does not hash to its fingerprint")
    return manifest


def _cause(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Looking for cycles among the hundreds of thousands of new objects would double the time to load them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _manifest(
    url: str, kind: Kind, shards: tuple[ShardEntry, ...], recipe: dict[str, Any], facts: dict[str, Any]
) -> Manifest:
    identity = {
        "kind": kind,
        "recipe": recipe,
        "shards": [[shard.name, shard.sha256, shard.samples] for shard in shards],
    }
    num_samples = sum(shard.samples for shard in shards)
    return Manifest(url, kind, shards, num_samples, fingerprint(identity), recipe, facts)


# -------------------------------------------------------------------------------------- commit records


def _record_url(url: str, unit: int) -> str:
    return storage.join(url, "commits", f"{unit:06d}.json")


def commit_unit(
    url: str, unit: int, parts: Sequence[Part], body: dict[str, Any], *, are_published: bool = False
) -> dict[str, Any]:
    """Publishes the shards of a finished unit and commits them; a unit without samples commits too.

    Args:
        url: the data set's folder.
        unit: number of the unit in the plan.
        parts: what `UnitWriter.finish` returned.
        body: JSON facts of the stage to keep in the record: exclusions, videos, versions. Its keys stand beside
            ``unit`` and ``parts``.
        are_published: `publish_part` has published all parts already.

    Returns:
        The record that holds from now on: that of the first writer. Another one's shards remain as orphans.

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
    """Publishes the shards of a committed unit again, and its record where that is missing, damaged or of others.

    Args:
        url: the data set's folder.
        unit: number of the unit in the plan.
        parts: with the names and hashes that the unit had.
        body: as for `commit_unit`.

    Returns:
        The record that holds from now on.
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
    """Puts a shard and its index into a data set's folder, where they belong to nobody until a unit is committed."""
    storage.publish_file(part.path, storage.join(url, part.name))
    storage.publish_file(part.index_path, storage.join(url, part.name + INDEX_SUFFIX))


def _record(unit: int, parts: Sequence[Part], body: dict[str, Any]) -> dict[str, Any]:
    if taken := body.keys() & {"schema", "unit", "parts"}:
        raise ValueError(f"the body of a commit record cannot have the keys {sorted(taken)}")
    return {"unit": unit, "parts": [entry_of(part)._asdict() for part in parts], **body}


def entry_of(part: Part) -> ShardEntry:
    """How commit records and manifests name a finished shard."""
    return ShardEntry(part.name, part.bytes, part.sha256, file_sha256(part.index_path), part.samples)


def committed_units(url: str) -> list[int]:
    """Numbers of the committed units, ascending: one listing, no record is read."""
    names = (_RECORD_NAME.fullmatch(entry.name) for entry in storage.list_folder(storage.join(url, "commits")))
    return sorted(int(name[1]) for name in names if name)


def read_commit(url: str, unit: int) -> dict[str, Any]:
    """The commit record of a unit: ``unit``, ``parts`` (fields of `ShardEntry`) and the stage's own keys.

    Raises:
        FileNotFoundError: the unit is not committed.
        UserError: its record is damaged, or of a newer schema.
    """
    document = storage.read_document(_record_url(url, unit), SCHEMA)
    try:
        if document["unit"] != unit:
            raise ValueError(f"it is of unit {document['unit']!r:.80}")
        for part in document["parts"]:
            ShardEntry.parse(part)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{_record_url(url, unit)} is damaged ({_cause(error)}); restore it, or run `clipmill verify --repair`"
        ) from error
    return document


def read_parts(url: str, unit: int) -> tuple[ShardEntry, ...]:
    """The shards of a committed unit.

    Raises:
        FileNotFoundError: the unit is not committed.
        UserError: its record is damaged, or of a newer schema.
    """
    return tuple(map(ShardEntry.parse, read_commit(url, unit)["parts"]))


def unit_of(name: str) -> int | None:
    """The unit that a shard, or its index, is of; None where a name does not say so."""
    found = _UNIT.match(name)
    return int(found[1]) if found else None


def read_commits(url: str, units: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The commit records of ``units``, in their order, several read at once.

    Raises:
        FileNotFoundError: one of them is not committed.
    """
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for first in range(0, len(units), READ_AHEAD):
            yield from readers.map(lambda unit: read_commit(url, unit), units[first : first + READ_AHEAD])


# ---------------------------------------------------------------------------------------------- freeze


def freeze(
    url: str,
    kind: Kind,
    units: Sequence[int],
    recipe: dict[str, Any],
    facts: dict[str, Any],
    known: Mapping[int, Sequence[ShardEntry]] | None = None,
) -> Manifest:
    """Makes a data set of committed units: writes ``shards.txt``, ``wids.json`` and, last, ``manifest.json``.

    Running it again with the same input changes nothing on disk.

    Args:
        url: the data set's folder.
        kind: what the samples are.
        units: numbers of the units, in the order of the data set.
        recipe: JSON facts that enter the fingerprint.
        facts: other JSON facts for readers.
        known: shards of units whose commit records need not be read again.

    Raises:
        FileNotFoundError: a unit is not committed.
        UserError: a commit record is damaged.
    """
    recipe, facts = json.loads(json.dumps([recipe, facts]))  # as every reader will see them: tuples become lists
    found = dict(known or {})
    unknown = [unit for unit in units if unit not in found]
    for record in read_commits(url, unknown):
        found[record["unit"]] = tuple(map(ShardEntry.parse, record["parts"]))
    manifest = _manifest(url, kind, tuple(shard for unit in units for shard in found[unit]), recipe, facts)
    for name, content in shard_lists(manifest).items():
        publish_changed(storage.join(url, name), content)
    document = {
        "kind": kind,
        "units": list(units),
        "shards": [shard._asdict() for shard in manifest.shards],
        "num_samples": manifest.num_samples,
        "fingerprint": manifest.fingerprint,
        "recipe": recipe,
        "facts": facts,
    }
    document_url = storage.join(url, "manifest.json")
    if not storage.exists(document_url) or storage.read_document(document_url, SCHEMA) != {
        "schema": SCHEMA,
        **document,
    }:
        storage.publish_document(document_url, document, SCHEMA)
    return manifest
