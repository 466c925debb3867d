"""Samples of a manifest, or of a mixture of several, as torch batches in the order of `clipmill.shards.order`.

The loader keeps no state. A micro-batch is a function of its number: a worker gets the number and computes positions,
shards and rows itself. So the sequence does not depend on the number of workers, and a resumed run just starts at
another number.

    G  global batch    W  world size    share = ceil(G / W) rows of a rank
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from clipmill.errors import ClipmillError
from clipmill.shards.cache import OpenShard, ShardCache
from clipmill.shards.format import parse_npy, read_sample
from clipmill.shards.manifest import Manifest
from clipmill.shards.mixture import NUM_SLOTS, MixtureOrder
from clipmill.shards.order import Order, locate_stored, num_streams
from clipmill.shards.places import EvalPlaces, Rows, TrainPlaces, shares
from clipmill.shards.workers import load_batches

__all__ = [
    "Augment",
    "Decode",
    "MixedDataset",
    "ShardDataset",
    "decode_clip",
    "decode_clip_filled_up",
    "decode_codes",
    "eval_batches",
    "train_batches",
]

Decode = Callable[[dict[str, memoryview]], dict[str, Any]]
"""Members of a sample -> its fields. A module-level function, since loader workers import it by name."""

Augment = Callable[[dict[str, Any], int], dict[str, Any]]
"""(Sample, its position in the run) -> sample. Pickled for the loader workers."""

BATCH_DTYPES = {"codes": np.int64}
"""Fields that are wider in a batch than on disk: one cast per batch costs less than one per sample."""
_decode_json = json.JSONDecoder().raw_decode  # json.loads also checks for encodings and spaces
LOOK_AHEAD = 64
"""A worker starts to download a shard this many micro-batches ahead: enough for about 100 MB over a slow link."""


# -------------------------------------------------------------------------------------------- decoding


def decode_clip(members: dict[str, memoryview]) -> dict[str, Any]:
    """Decodes a sample of ``clips``.

    Returns:
        ``video`` uint8 [T, H, W, 3], ``label`` str | None, ``meta`` (the whole json member), and if the clip has
        actions ``actions`` float32 [T, action_dim].
    """
    if "mp4" in members:
        from clipmill.video import decode_mp4  # imported here: a prior trains on machines without codecs

        video = decode_mp4(bytes(members["mp4"]))
    elif "mkv" in members:
        from clipmill.video import decode_mjpeg  # imported here, as above

        video = decode_mjpeg(members["mkv"])
    else:
        video = parse_npy(members["npy"])
    meta = _parse_json(members["json"])
    return {"video": video, "label": meta["label"], "meta": meta, **_actions(members)}


def decode_clip_filled_up(members: dict[str, memoryview], num_frames: int) -> dict[str, Any]:
    """Decodes a sample of ``clips`` like `decode_clip`, padded to the number of frames of its batch.

    Args:
        members: members of the sample.
        num_frames: T; a shorter clip, such as a picture, repeats its last frame.

    Returns:
        The fields of `decode_clip`, and ``num_frames`` int64, the clip's own number of frames.
    """
    sample = decode_clip(members)
    video = sample["video"]
    missing = np.repeat(video[-1:], num_frames - len(video), axis=0)
    return {**sample, "video": np.concatenate((video, missing)), "num_frames": np.array(len(video))}


def decode_codes(members: dict[str, memoryview]) -> dict[str, Any]:
    """Decodes a sample of ``tokens``.

    Returns:
        ``codes`` [t, h, w] or [t, h, w, M] in the narrow type of the disk (int64 in a batch), ``label`` str | None, and
        if the sample has them ``actions`` float32 [T, action_dim], ``text`` float32 [S, E] (an embedding) and
        ``frames`` uint8 [n, H, W, 3].
    """
    codes = parse_npy(members["codes.npy"])
    fields = {"codes": codes, "label": _parse_json(members["json"])["label"], **_actions(members)}
    if "text.npy" in members:
        fields["text"] = parse_npy(members["text.npy"]).astype(np.float32)
    if "frames.npy" in members:
        fields["frames"] = parse_npy(members["frames.npy"])
    return fields


def _parse_json(content: memoryview) -> dict[str, Any]:
    return _decode_json(str(content, "utf-8"))[0]


def _actions(members: dict[str, memoryview]) -> dict[str, np.ndarray]:
    if "actions.npy" not in members:
        return {}
    return {"actions": parse_npy(members["actions.npy"]).astype(np.float32)}


def _collate(samples: Sequence[dict[str, Any]], weight: np.ndarray) -> dict[str, Any]:
    """Collates samples: arrays become tensors [rows, ...], other fields (labels, keys) lists. Adds ``weight``.

    Fields that some samples lack are dropped, such as actions where only some videos have them.
    """
    batch: dict[str, Any] = {}
    shared = [field for field in samples[0] if all(field in sample for sample in samples)]
    for field in shared:
        values = [sample[field] for sample in samples]
        if isinstance(values[0], np.ndarray):
            batch[field] = torch.from_numpy(np.stack(values, dtype=BATCH_DTYPES.get(field)))
        else:
            batch[field] = values
    return {**batch, "weight": torch.from_numpy(weight)}


# ---------------------------------------------------------------------------------------------- dataset


class ShardDataset(Dataset[dict[str, Any]]):
    """The samples of a manifest in stored order. Each shard is verified before its first sample is read.

    Args:
        manifest: the data set.
        decode: turns a sample's members into fields. The arrays that it returns are read-only.
        cache_dir: local folder for downloaded shards and notes on verified ones. None uses this user's folder in the
            system's temporary folder.
        cache_bytes: limit for the downloaded shards.
    """

    def __init__(
        self, manifest: Manifest, decode: Decode, cache_dir: Path | None = None, cache_bytes: int = 64 * 2**30
    ) -> None:
        self.manifest = manifest
        self._decode = decode
        self._cache = ShardCache(manifest, cache_dir, cache_bytes)
        self._ends = np.cumsum(manifest.counts)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample with this number in stored order."""
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} in a data set of {len(self)}")
        shard, row = locate_stored(self._ends, np.array([index]))
        return self.read(int(shard[0]), int(row[0]))

    def read(self, shard: int, row: int) -> dict[str, Any]:
        """Reads a sample by shard and row.

        Returns:
            The fields from ``decode``, and ``key``.

        Raises:
            UserError: the shard is missing, or differs from the manifest.
        """
        return self._read(self._cache.open(shard), self.manifest.stored_row(shard, row))

    def read_rows(self, shards: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
        """Reads several samples like `read`. Each shard is opened and checked once.

        Args:
            shards: int64 [n], numbers of shards.
            rows: int64 [n], rows in these shards.
        """
        opened = {shard: self._cache.open(shard) for shard in dict.fromkeys(shards.tolist())}
        return [
            self._read(opened[shard], self.manifest.stored_row(shard, row))
            for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
        ]

    def _read(self, opened: OpenShard, row: int) -> dict[str, Any]:
        key, members = read_sample(opened.view, *opened.offsets[row : row + 2].tolist())
        sample = self._decode(members)
        sample["key"] = key
        return sample

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard: int64 [num_shards]."""
        return self.manifest.counts

    @property
    def datasets(self) -> list[ShardDataset]:
        """See `MixedDataset`."""
        return [self]

    @property
    def slots(self) -> np.ndarray:
        """See `MixedDataset`."""
        return np.array([NUM_SLOTS])

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded before they are read."""
        return self._cache.is_remote

    def prefetch(self, shards: np.ndarray) -> None:
        """Starts to download shards (int64 [n], in order of use) in the background."""
        self._cache.prefetch(dict.fromkeys(shards.tolist()))

    def order(self, seed: int, global_batch: int, window: int) -> Order:
        """The order in which training reads the samples."""
        return Order(self.counts, seed, num_streams(global_batch), window)


class MixedDataset:
    """A mixture of several data sets. Shards are numbered through all of them, in their order.

    Args:
        datasets: the data sets; training needs samples in all of them.
        slots: int64 [len(datasets)], their weights in steps of 1 / `NUM_SLOTS`.
    """

    def __init__(self, datasets: Sequence[ShardDataset], slots: np.ndarray) -> None:
        self.datasets, self.slots = list(datasets), slots
        self._first_shards = np.cumsum([0, *(len(dataset.counts) for dataset in datasets)])

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard: int64 [num_shards]."""
        return np.concatenate([dataset.counts for dataset in self.datasets])

    def read_rows(self, shards: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
        """See `ShardDataset`."""
        samples: list[dict[str, Any]] = []
        numbers = np.searchsorted(self._first_shards, shards, side="right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]  # batches are sorted by data set
        for start, end in pairwise(cuts):
            number = int(numbers[start])
            samples += self.datasets[number].read_rows(shards[start:end] - self._first_shards[number], rows[start:end])
        return samples

    @property
    def is_remote(self) -> bool:
        """Whether some shards are downloaded before they are read."""
        return any(dataset.is_remote for dataset in self.datasets)

    def prefetch(self, shards: np.ndarray) -> None:
        """See `ShardDataset`."""
        for dataset, (first, end) in zip(self.datasets, pairwise(self._first_shards), strict=True):
            dataset.prefetch(shards[(shards >= first) & (shards < end)] - first)

    def order(self, seed: int, global_batch: int, window: int) -> MixtureOrder:
        """The order in which training reads the samples."""
        return MixtureOrder([dataset.counts for dataset in self.datasets], self.slots, seed, global_batch, window)


# ---------------------------------------------------------------------------------------------- batches


def train_batches(
    dataset: ShardDataset | MixedDataset,
    order: Order | MixtureOrder,
    *,
    global_batch: int,
    micro_batch: int | None,
    rank: int,
    world_size: int,
    first_step: int,
    num_workers: int,
    augment: Augment | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yields the micro-batches of one rank, step by step, without end.

    Args:
        dataset: the data set or mixture.
        order: order of this data set, from its ``order`` method.
        global_batch: G, samples per step over all ranks.
        micro_batch: most rows per batch; None takes the rank's whole share.
        rank: 0 to ``world_size`` - 1.
        world_size: W.
        first_step: step to start at; together with G, this is the loader's whole state.
        num_workers: processes that read and decode; 0 does it in this process.
        augment: augments samples by their positions; None does not.

    Yields:
        For each step, ceil(share / micro_batch) batches of equal size, the same number on every rank. A batch has the
        fields from ``decode``, ``key``, and ``weight`` float32 [rows]: 0 on padding rows. If W does not divide G, a
        batch may consist of padding only.

    Raises:
        UserError: a shard is missing or damaged.
    """
    share = -(-global_batch // world_size)
    num_micro_batches = -(-share // (micro_batch or share))
    places = TrainPlaces(order, global_batch, rank, world_size, num_micro_batches)
    source = _Batches(dataset, places, augment)
    batches = load_batches(source, range(first_step * num_micro_batches, sys.maxsize), num_workers)
    while True:
        yield [next(batches) for _ in range(num_micro_batches)]


def eval_batches(
    dataset: ShardDataset | MixedDataset,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    max_samples: int | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yields the samples of a data set once, in stored order: rank r takes the r-th of W contiguous shares.

    If the data set has more samples than ``max_samples``, about one sample per video is taken, beginning with the first
    videos. That covers more videos than the first samples would, and still reads few shards. A mixture is read one data
    set after the other, each in this way.

    Args:
        dataset: the data set or mixture.
        batch_size: rows per batch, at most a rank's share.
        rank: 0 to ``world_size`` - 1.
        world_size: W.
        max_samples: the most samples over all ranks; None reads all. In a mixture, each data set contributes by weight,
            and if one has too few samples, the others fill in.
        num_workers: processes that read and decode; 0 does it in this process.

    Yields:
        Batches as in `train_batches`, all of the same size and the same number on every rank.

    Raises:
        UserError: a shard is missing or damaged.
    """
    sizes = np.array([len(one) for one in dataset.datasets])
    taken = sizes if max_samples is None else shares(max_samples, sizes, dataset.slots)
    clips_per_video = np.array([one.manifest.clips_per_video for one in dataset.datasets])
    spans = np.minimum(sizes, np.ceil(taken * clips_per_video).astype(np.int64))
    places = EvalPlaces(dataset.counts, sizes, spans, taken, rank, world_size, batch_size)
    return load_batches(_Batches(dataset, places), range(places.num_batches), num_workers)


class _Batches(Dataset[Any]):
    """Collated batches by number; this object is everything that a loader worker gets."""

    def __init__(
        self, dataset: ShardDataset | MixedDataset, places: Callable[[int], Rows], augment: Augment | None = None
    ) -> None:
        self._dataset, self._places, self._augment = dataset, places, augment

    def __getitem__(self, number: int) -> dict[str, Any] | ClipmillError:
        place = self._places(number)
        if self._dataset.is_remote:
            self._dataset.prefetch(place.shards)
            self._dataset.prefetch(self._places(number + LOOK_AHEAD).shards)
        try:
            samples = self._dataset.read_rows(place.shards, place.rows)
        except ClipmillError as error:  # returned: torch would bury an error raised in a worker in a traceback
            return error
        if self._augment is not None:
            samples = [self._augment(*each) for each in zip(samples, place.positions.tolist(), strict=True)]
        return _collate(samples, place.weight)
