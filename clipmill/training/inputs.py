"""What both training stages ask of the disk before they start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from clipmill.config import RunConfig, TrainingConfig, refused_changes
from clipmill.errors import UserError
from clipmill.models.export import read_latest
from clipmill.shards.cache import needed_cache_bytes
from clipmill.shards.dataset import ShardDataset
from clipmill.shards.manifest import Kind, Manifest
from clipmill.shards.order import num_streams, same_video_pairs, streams_of_ranks
from clipmill.training import checkpoint

__all__ = ["check_cache", "describe_batches", "finished_step", "open_dataset", "require_manifest"]

logger = logging.getLogger(__name__)


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


def check_cache(dataset: ShardDataset, training: TrainingConfig, *, world_size: int, local_size: int) -> None:
    """Whether the shards that a node reads at once fit the cache, if they are downloaded at all.

    Args:
        dataset: the training split.
        training: its batch, window and cache.
        world_size: number of ranks.
        local_size: ranks of this node.

    Raises:
        UserError: they do not, and each would be downloaded again and again.
    """
    if not dataset.is_remote:
        return
    streams = streams_of_ranks(num_streams(training.global_batch), local_size, world_size)
    needed = needed_cache_bytes(dataset.manifest, streams, training.shuffle_window)
    if needed > training.cache_bytes:
        raise UserError(
            f"cache_bytes {training.cache_bytes:,} is too small for the order of {dataset.manifest.url}: {streams} "
            f"streams of this node x (shuffle_window {training.shuffle_window} / samples per shard + 2) x shard bytes "
            f"need {needed:,}; raise cache_bytes, lower shuffle_window, or use more nodes"
        )


def describe_batches(manifest: Manifest, training: TrainingConfig, world_size: int) -> None:
    """Logs what the order does to a batch: padding, and how many of its pairs of clips share a video."""
    batch = training.global_batch
    padding = -batch % world_size
    if padding:
        logger.info(
            "global_batch %d on %d ranks: %d of %d rows a step only fill up (weight 0)",
            batch,
            world_size,
            padding,
            batch + padding,
        )
    streams = num_streams(batch)
    if num_videos := manifest.facts.get("num_videos"):
        clips_per_video = max(1.0, manifest.num_samples / num_videos)
        pairs = same_video_pairs(batch, streams, training.shuffle_window, clips_per_video)
        logger.info(
            "expected same-video pairs a batch: P C(G/P, 2) (c - 1)/(w - 1) = %.3g, %.2g %% of the batch "
            "(G %d, P %d, w %d, c %.1f clips a video)",
            pairs,
            100 * pairs / batch,
            batch,
            streams,
            training.shuffle_window,
            clips_per_video,
        )


def finished_step(folder_url: str, identity: dict[str, Any], training: TrainingConfig) -> int:
    """Steps of the newest export of a training folder, 0 without one.

    Raises:
        UserError: the export or the newest checkpoint was trained with other identity keys or on other data.
    """
    latest = read_latest(folder_url)
    newest = checkpoint.newest(folder_url)
    trained = [latest[0]["identity"]] if latest else []
    unfinished = [newest.state["identity"]] if newest else []
    for known in trained + unfinished:
        if changes := refused_changes(known, identity, training.accept_new_dataset):
            raise UserError(f"{folder_url} has other settings: {', '.join(changes)}; restore them or take another root")
    return int(latest[0]["step"]) if latest else 0
