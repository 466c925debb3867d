"""The manifest: the description of a frozen data set, and the only file that readers trust.

Once all units of a data set are committed (see `clipmill.shards.commits`), `clipmill.shards.freeze` writes
``manifest.json``. Its names are relative and its fingerprint does not include the folder, so a copied data set is the
same data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from clipmill import storage
from clipmill.config import fingerprint
from clipmill.errors import DamagedDocument, UserError
from clipmill.shards.commits import SCHEMA, ShardEntry, damage_of, is_count, unit_of

__all__ = ["SPLITS", "Kind", "Manifest", "make_manifest"]

SPLITS = ("train", "val")
"""The data sets of a stage that separates training data from validation data; each has its own subfolder."""

Kind = Literal["clips", "tokens", "samples"]
_MADE_BY: dict[Kind, str] = {"clips": "shard", "tokens": "tokenize", "samples": "sample"}
_COUNTED_FACTS = {"num_units", "num_videos", "num_generations", "num_clips", "exclusions"}


@dataclass(frozen=True)
class Manifest:
    """A frozen data set."""

    url: str
    """The folder it was loaded from; not part of its identity."""
    kind: Kind
    shards: tuple[ShardEntry, ...]
    num_samples: int
    """Number of samples without excluded ones."""
    fingerprint: str
    """SHA-256 (hex) over kind, recipe, and the shards' names, hashes and counts."""
    recipe: dict[str, Any]
    """How the samples were made: equal recipes and inputs give equal samples."""
    facts: dict[str, Any]
    """Facts for readers that are not part of the identity: class names, pixel statistics, versions."""
    excluded: Mapping[int, np.ndarray] = field(default_factory=dict, compare=False)
    """Rows that readers do not see, by the number of their shard: ascending int64. See `without`."""

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard without excluded ones: int64 [num_shards]."""
        counts = np.array([shard.samples for shard in self.shards], np.int64)
        for shard, rows in self.excluded.items():
            counts[shard] -= len(rows)
        return counts

    @property
    def num_stored(self) -> int:
        """Samples of all shards, excluded ones too."""
        return sum(shard.samples for shard in self.shards)

    def without(self, rows: Mapping[int, Sequence[int]]) -> Manifest:
        """The same shards without some samples. Readers number the others as if these did not exist.

        Args:
            rows: rows to exclude, ascending, by the number of their shard.
        """
        if not rows:
            return self
        identity = {"of": self.fingerprint, "without": sorted([shard, list(found)] for shard, found in rows.items())}
        return dataclasses.replace(
            self,
            num_samples=self.num_samples - sum(map(len, rows.values())),
            fingerprint=fingerprint(identity),
            excluded={shard: np.array(found, np.int64) for shard, found in rows.items()},
        )

    def stored_row(self, shard: int, row: int) -> int:
        """The stored row of the sample that readers number ``row``."""
        if shard not in self.excluded:
            return row
        # rows[i] - i rows before the i-th excluded row are not excluded.
        rows = self.excluded[shard]
        return row + int(np.searchsorted(rows - np.arange(len(rows)), row, side="right"))

    @property
    def clips_per_video(self) -> float:
        """Mean number of samples per video, which are stored side by side; 1 if the number of videos is not known."""
        num_videos = self.facts.get("num_videos")
        return max(1.0, self.num_samples / num_videos) if num_videos else 1.0

    def units(self) -> dict[int, tuple[ShardEntry, ...]]:
        """The shards of each unit, by unit number. A unit without samples has an empty tuple."""
        found: dict[int, list[ShardEntry]] = {unit: [] for unit in range(self.facts.get("num_units") or 0)}
        for shard in self.shards:
            if (unit := unit_of(shard.name)) is not None:
                found.setdefault(unit, []).append(shard)
        return {unit: tuple(shards) for unit, shards in found.items()}

    @staticmethod
    def load(url: str, kind: Kind | None = None) -> Manifest:
        """Reads ``manifest.json`` of a data set folder that must hold ``kind``; None accepts any kind.

        Raises:
            FileNotFoundError: there is no manifest, because the data set is not finished.
            DamagedDocument: the manifest is damaged.
            UserError: it has a newer schema, or the data set holds another kind.
        """
        document_url = storage.join(url, "manifest.json")
        with _garbage_collection_paused():
            document = storage.read_document(document_url, SCHEMA)
            try:
                manifest = _parse_manifest(url, document)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise DamagedDocument(
                    f"{document_url} is damaged ({damage_of(error)}); restore it, or remove it and run the data set's "
                    "stage again"
                ) from error
        if kind is not None and manifest.kind != kind:
            raise UserError(f"{url} holds {manifest.kind}, not {kind}; name a folder of {kind}")
        return manifest

    @staticmethod
    def require(url: str, kind: Kind, advice: str = "with this config first") -> Manifest:
        """Like ``load``, for a data set that a stage needs.

        Args:
            url: folder of the data set.
            kind: the kind that it must hold.
            advice: how to run the stage that makes it.

        Raises:
            UserError: as for ``load``, or the data set does not exist yet.
        """
        try:
            return Manifest.load(url, kind)
        except FileNotFoundError as error:
            raise UserError(f"no {kind} at {url}; run `clipmill {_MADE_BY[kind]}` {advice}") from error


def _parse_manifest(url: str, document: dict[str, Any]) -> Manifest:
    """Parses and checks a manifest.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: the document is not a manifest.
    """
    shards = tuple(ShardEntry.parse(entry) for entry in document["shards"])
    if document["kind"] not in _MADE_BY:
        raise ValueError(f"it holds {document['kind']!r:.80}")
    recipe, facts = document["recipe"], document["facts"]
    if not (isinstance(recipe, dict) and isinstance(facts, dict)):
        raise ValueError("its recipe or facts are not an object")
    for name in _COUNTED_FACTS & facts.keys():
        if facts[name] is not None and not is_count(facts[name]):
            raise ValueError(f"its {name} is {facts[name]!r:.80}")
    if facts.get("num_units") not in (None, len(document["units"])):  # readers loop up to this number
        raise ValueError(f"its num_units is {facts['num_units']}, it names {len(document['units'])} units")
    manifest = make_manifest(url, document["kind"], shards, recipe, facts)
    if manifest.fingerprint != document["fingerprint"]:
        raise ValueError("its content does not hash to its fingerprint")
    return manifest


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pauses the garbage collector: scanning hundreds of thousands of new objects would double the loading time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def make_manifest(
    url: str, kind: Kind, shards: tuple[ShardEntry, ...], recipe: dict[str, Any], facts: dict[str, Any]
) -> Manifest:
    """The manifest of these shards, with its counts and its fingerprint."""
    identity = {
        "kind": kind,
        "recipe": recipe,
        "shards": [[shard.name, shard.sha256, shard.samples] for shard in shards],
    }
    num_samples = sum(shard.samples for shard in shards)
    return Manifest(url, kind, shards, num_samples, fingerprint(identity), recipe, facts)
