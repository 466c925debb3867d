"""Freezing: committed units become a data set with a manifest, and with shard lists for other readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from clipmill import storage
from clipmill.errors import DamagedDocument
from clipmill.shards.commits import SCHEMA, ShardEntry, read_commits
from clipmill.shards.interop import publish_changed, shard_lists
from clipmill.shards.manifest import Kind, Manifest, make_manifest

__all__ = ["freeze"]


def freeze(
    url: str,
    kind: Kind,
    units: Sequence[int],
    recipe: dict[str, Any],
    facts: dict[str, Any],
    known: Mapping[int, Sequence[ShardEntry]] | None = None,
) -> Manifest:
    """Freezes committed units into a data set: writes ``shards.txt``, ``wids.json`` and, last, ``manifest.json``.

    Running it again with the same input changes nothing on disk.

    Args:
        url: the data set's folder.
        kind: kind of the samples.
        units: numbers of the units, in the order of the data set.
        recipe: JSON facts that enter the fingerprint.
        facts: other JSON facts for readers.
        known: shards of units whose commit records need not be read again; None reads all records.

    Raises:
        FileNotFoundError: a unit is not committed.
        UserError: a commit record is damaged.
    """
    recipe, facts = json.loads(json.dumps([recipe, facts]))  # in the form that readers get: tuples become lists
    found = dict(known or {})
    unknown = [unit for unit in units if unit not in found]
    for record in read_commits(url, unknown):
        found[record["unit"]] = tuple(map(ShardEntry.parse, record["parts"]))
    manifest = make_manifest(url, kind, tuple(shard for unit in units for shard in found[unit]), recipe, facts)
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
    try:
        is_there = storage.read_document(document_url, SCHEMA) == {"schema": SCHEMA, **document}
    except (FileNotFoundError, DamagedDocument):
        is_there = False
    if not is_there:
        storage.publish_document(document_url, document, SCHEMA)
    return manifest
