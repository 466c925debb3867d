"""The manifest: a frozen data set, and all that readers trust.

Once all units of a data set are committed (see `clipmill.shards.commits`), `clipmill.shards.freeze` writes
``manifest.json``. Names in it are relative and the fingerprint leaves the folder out, so a copied data set is the same
data set.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipmill import storage
from clipmill.config import fingerprint
from clipmill.errors import DamagedDocument, UserError
from clipmill.shards.commits import SCHEMA, ShardEntry, damage_of, is_count, unit_of

__all__ = ["SPLITS", "Kind", "Manifest", "make_manifest"]

SPLITS = ("train", "val")
"""The data sets, side by side in one folder, of a stage that keeps what is trained on apart from what judges it."""

Kind = Literal["clips", "tokens", "samples"]
_MADE_BY: dict[Kind, str] = {"clips": "shard", "tokens": "tokenize", "samples": "sample"}
_COUNTED_FACTS = {"num_units", "num_videos", "num_generations", "num_clips", "exclusions"}


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
            DamagedDocument: it cannot be read.
            UserError: it has a newer schema, or holds something else than ``kind``.
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
    manifest = make_manifest(url, document["kind"], shards, recipe, facts)
    if manifest.fingerprint != document["fingerprint"]:
        raise ValueError("its content does not hash to its fingerprint")
    return manifest


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
