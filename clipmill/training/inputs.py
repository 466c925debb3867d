"""What both training stages ask of the disk before they start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipmill.config import RunConfig, TrainingConfig, changed_keys
from clipmill.errors import UserError
from clipmill.models.export import read_latest
from clipmill.shards.dataset import ShardDataset
from clipmill.shards.manifest import Kind, Manifest
from clipmill.training import checkpoint

__all__ = ["finished_step", "open_dataset", "require_manifest"]


def require_manifest(config: RunConfig, kind: Kind, split: str) -> Manifest:
    """The manifest of ``clips`` or ``tokens``.

    Raises:
        UserError: it is not there yet, or its train split is empty.
    """
    made_by = "shard" if kind == "clips" else "tokenize"
    url = config.folder(kind, split)
    try:
        manifest = Manifest.load(url, kind)
    except FileNotFoundError as error:
        raise UserError(f"no {kind} at {url}; run `clipmill {made_by}` with this config first") from error
    if split == "train" and manifest.num_samples == 0:
        raise UserError(f"the {kind} at {url} are empty; give `clipmill shard` longer or more videos")
    return manifest


def open_dataset(
    manifest: Manifest, decode: Callable[[dict[str, memoryview]], dict[str, Any]], training: TrainingConfig
) -> ShardDataset:
    """The samples of a manifest, through the cache that all workers of a node share."""
    return ShardDataset(manifest, decode, cache_bytes=training.cache_bytes)


def finished_step(folder_url: str, identity: dict[str, Any]) -> int:
    """Steps of the newest export of a training folder, 0 without one.

    Raises:
        UserError: the export or the newest checkpoint was trained with other identity keys or on other data.
    """
    latest = read_latest(folder_url)
    newest = checkpoint.newest(folder_url)
    trained = [latest[0]["identity"]] if latest else []
    unfinished = [newest.state["identity"]] if newest else []
    for known in trained + unfinished:
        if changes := changed_keys(known, identity):
            raise UserError(f"{folder_url} has other settings: {', '.join(changes)}; restore them or take another root")
    return int(latest[0]["step"]) if latest else 0
