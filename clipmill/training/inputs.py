"""Inputs of both training stages: checks before they start, data sets, and existing exports."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from clipmill import storage
from clipmill.config import RunConfig, TrainingConfig, refused_changes
from clipmill.errors import UserError
from clipmill.models.export import exported_steps, read_latest
from clipmill.shards.cache import needed_cache_bytes
from clipmill.shards.dataset import Decode, MixedDataset, ShardDataset
from clipmill.shards.exclusions import exclude, read_exclusions
from clipmill.shards.manifest import Kind, Manifest
from clipmill.shards.mixture import NUM_SLOTS, apportion, node_streams, streams_of_datasets
from clipmill.shards.order import same_video_pairs
from clipmill.training import checkpoint

__all__ = [
    "check_cache",
    "describe_batches",
    "finished_step",
    "identity_of",
    "open_dataset",
    "require_manifests",
    "require_rows",
    "slots_of",
]

logger = logging.getLogger(__name__)


def require_manifests(config: RunConfig, kind: Kind, split: str) -> list[Manifest]:
    """The manifest of this run's ``clips`` or ``tokens``, or those of the runs in its mix, without excluded clips.

    Raises:
        UserError: a manifest does not exist yet, or its train split is empty; or ``data.exclude`` is not a list of
            clips, or lists clips of other data sets.
    """
    manifests = [_require_manifest(config, root, kind, split) for root in _roots(config)]
    if config.data.exclude is None:
        return manifests
    clips = read_exclusions(config.data.exclude)
    left = [exclude(manifest, clips) for manifest in manifests]
    if clips and split == "train" and not any(manifest.excluded for manifest in left):
        others = [_require_manifest(config, root, kind, "val") for root in _roots(config)]
        if not any(exclude(manifest, clips).excluded for manifest in others):
            raise UserError(
                f"data.exclude: no clip that {config.data.exclude} names is in {', '.join(_roots(config))}; write it "
                "for these clips by `clipmill inspect ROOT --duplicates FILE`, or remove the key"
            )
    for manifest in left:
        if not manifest.num_samples and manifest.num_stored:
            raise UserError(f"data.exclude: {config.data.exclude} leaves nothing of {manifest.url}; shorten it")
    return left


def _roots(config: RunConfig) -> list[str]:
    """Roots of the runs whose data sets are read."""
    return [part.url for part in config.data.mix] or [config.root]


def _require_manifest(config: RunConfig, root: str, kind: Kind, split: str) -> Manifest:
    url, mixed = storage.join(root, kind, split), "for that run first, or correct data.mix"
    manifest = Manifest.require(url, kind, mixed) if config.data.mix else Manifest.require(url, kind)
    if split == "train" and manifest.num_samples == 0:
        raise UserError(f"the {kind} at {url} are empty; give `clipmill shard` longer or more videos")
    return manifest


def slots_of(config: RunConfig) -> np.ndarray:
    """The shares of the data sets in the mix, in thousandths: int64 [num data sets]; without a mix, [1,000].

    Raises:
        UserError: a share is less than a thousandth.
    """
    slots = apportion(NUM_SLOTS, [part.weight for part in config.data.mix] or [1.0])
    for part, share in zip(config.data.mix, slots, strict=False):
        if share == 0:
            raise UserError(
                f"data.mix: weight {part.weight:g} of {part.url} is less than a thousandth of all; raise it, or leave "
                "it out"
            )
    return slots


def identity_of(config: RunConfig, manifests: list[Manifest]) -> str | list[str]:
    """The data in a training's identity: its fingerprint, or for a mix the share and fingerprint of each data set."""
    if not config.data.mix:
        return manifests[0].fingerprint
    shares = zip(slots_of(config), manifests, strict=True)
    return [f"{slots}/{NUM_SLOTS} {manifest.fingerprint}" for slots, manifest in shares]


def open_dataset(
    config: RunConfig, manifests: list[Manifest], decode: Decode, training: TrainingConfig
) -> ShardDataset | MixedDataset:
    """Opens the samples of a run's manifests, through the cache that all workers of a node share."""
    parts = [ShardDataset(manifest, decode, cache_bytes=training.cache_bytes) for manifest in manifests]
    return MixedDataset(parts, slots_of(config)) if config.data.mix else parts[0]


def require_rows(training: TrainingConfig, world_size: int, section: str) -> None:
    """Checks that every rank has a clip in each step.

    Raises:
        UserError: some ranks have none.
    """
    if training.global_batch < world_size:
        raise UserError(
            f"{section}.training.global_batch={training.global_batch} leaves some of the {world_size} ranks without a "
            f"clip; make it {world_size} or more, or train on fewer ranks"
        )


def check_cache(
    dataset: ShardDataset | MixedDataset, training: TrainingConfig, *, world_size: int, local_size: int
) -> None:
    """Checks that the shards that a node reads at once fit the cache, if they are downloaded at all.

    Args:
        dataset: the training split.
        training: its batch, window and cache.
        world_size: number of ranks.
        local_size: ranks of each node.

    Raises:
        UserError: they do not fit, so each would be downloaded again and again.
    """
    nodes = node_streams(training.global_batch, dataset.slots, local_size, world_size)
    needed, streams = 0, 0
    for node in nodes.tolist():
        remote = [(part, count) for part, count in zip(dataset.datasets, node, strict=True) if part.is_remote]
        num_bytes = sum(needed_cache_bytes(part.manifest, count, training.shuffle_window) for part, count in remote)
        needed, streams = max((needed, streams), (num_bytes, sum(count for _, count in remote)))
    if needed > training.cache_bytes:
        urls = ", ".join(part.manifest.url for part in dataset.datasets if part.is_remote)
        raise UserError(
            f"cache_bytes {training.cache_bytes:,} is too small for the order of {urls}: {streams} streams of a node x "
            f"(shuffle_window {training.shuffle_window} / samples per shard + 2) x shard bytes need {needed:,}; raise "
            "cache_bytes, lower shuffle_window, or use more nodes"
        )


def describe_batches(dataset: ShardDataset | MixedDataset, training: TrainingConfig, world_size: int) -> None:
    """Logs properties of the batches: padding, and how many pairs of clips in a batch come from one video."""
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
    for manifest in (one.manifest for one in dataset.datasets):
        if manifest.excluded:
            num_excluded = manifest.num_stored - manifest.num_samples
            logger.info("%s: %d of %d clips are excluded", manifest.url, num_excluded, manifest.num_stored)
    streams = streams_of_datasets(batch, dataset.slots)
    for part, slots, part_streams in zip(dataset.datasets, dataset.slots.tolist(), streams, strict=True):
        share = batch * slots / NUM_SLOTS
        if part.manifest.facts.get("num_videos"):
            clips_per_video = part.manifest.clips_per_video
            pairs = same_video_pairs(share, part_streams, training.shuffle_window, clips_per_video)
            if pairs:
                logger.info(
                    "%s: a batch of %g clips has on average %.3g pairs of clips of one video; a larger "
                    "shuffle_window (now %d) lowers that (docs/loader.md)",
                    part.manifest.url,
                    share,
                    pairs,
                    training.shuffle_window,
                )


def finished_step(folder_url: str, identity: dict[str, Any], training: TrainingConfig) -> int:
    """Number of steps of the latest export of a training folder; 0 without an export.

    If the newest checkpoint has been exported too, its steps count, even if a user has since exported an earlier
    checkpoint and so made that the latest.

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
    if latest is None:
        return 0
    step = int(latest[0]["step"])
    if newest is not None and newest.step > step and newest.step in exported_steps(folder_url):
        return newest.step
    return step
