"""The one on-disk format that all stages share: tars, commit records, manifests, and the order to read them in.

`clipmill.shards.dataset` is imported by its own name: it needs torch, which planning and verifying do not.
"""

from __future__ import annotations

from clipmill.shards.format import Part, Sample, UnitWriter, json_bytes, npy_bytes, parse_npy
from clipmill.shards.manifest import Manifest, ShardEntry, commit_unit, committed_units, freeze, read_commit
from clipmill.shards.order import Order, batch_positions, num_streams, rank_rows
from clipmill.shards.verify import VerifyReport, prune, verify

__all__ = [
    "Manifest",
    "Order",
    "Part",
    "Sample",
    "ShardEntry",
    "UnitWriter",
    "VerifyReport",
    "batch_positions",
    "commit_unit",
    "committed_units",
    "freeze",
    "json_bytes",
    "npy_bytes",
    "num_streams",
    "parse_npy",
    "prune",
    "rank_rows",
    "read_commit",
    "verify",
]
