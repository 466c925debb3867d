"""Samples of a manifest, or of several in a mix, as torch batches in the order of `clipmill.shards.order`.

The loader keeps no state. A micro-batch is a function of its number, and a worker that is given the number computes
positions, shards and rows itself; so the sequence does not depend on the number of workers, and to resume is to
start counting elsewhere.

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
"""(Sample, its position in the run) -> sample; of the loader workers too."""

BATCH_DTYPES = {"codes": np.int64}
"""Of fields that are wider in a batch than on disk: the cast costs less once a batch than once a sample."""
_decode_json = json.JSONDecoder().raw_decode  # json.loads looks for encodings and spaces that our files do not have
LOOK_AHEAD = 64
"""Micro-batches before its own that a worker starts to download a shard: time for some 100 MB over a slow link."""


# -------------------------------------------------------------------------------------------- decoding


def decode_clip(members: dict[str, memoryview]) -> dict[str, Any]:
    """A sample of ``clips``.

    Returns:
        ``video`` uint8 [T, H, W, 3], ``label`` str | None, ``meta`` the whole json member, and if it has actions
        ``actions`` float32 [T, action_dim].
    """
    if "mp4" in members:
        from clipmill.video import decode_mp4  # here alone: a prior trains on a machine without codecs

        video = decode_mp4(bytes(members["mp4"]))
    elif "mkv" in members:
        from clipmill.video import decode_mjpeg  # here alone, as above

        video = decode_mjpeg(members["mkv"])
    else:
        video = parse_npy(members["npy"])
    meta = _parse_json(members["json"])
    return {"video": video, "label": meta["label"], "meta": meta, **_actions(members)}


def decode_clip_filled_up(members: dict[str, memoryview], num_frames: int) -> dict[str, Any]:
    """A sample of ``clips`` as `decode_clip`, of as many frames as others of its batch.

    Args:
        members: of the sample.
        num_frames: T; a clip of fewer frames, such as a picture, repeats its last one.

    Returns:
        Also ``num_frames`` int64, its own.
    """
    sample = decode_clip(members)
    video = sample["video"]
    missing = np.repeat(video[-1:], num_frames - len(video), axis=0)
    return {**sample, "video": np.concatenate((video, missing)), "num_frames": np.array(len(video))}


def decode_codes(members: dict[str, memoryview]) -> dict[str, Any]:
    """A sample of ``tokens``.

    Returns:
        ``codes`` [t, h, w] or [t, h, w, M] of as narrow a type as they have on disk (int64 once in a batch), ``label``
        str | None, and as far as it has them ``actions`` float32 [T, action_dim], ``text`` float32 [S, E] (an
        embedding), ``frames`` uint8 [n, H, W, 3].
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
    """Arrays become tensors [rows, ...], others (labels, keys) lists; adds ``weight``.

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
    """The samples of a manifest in stored order, each shard verified before its first sample is served.

    Args:
        manifest: what to read.
        decode: makes fields of a sample's members; arrays that it returns must not be written to.
        cache_dir: local folder for downloaded shards and for notes on what was verified; None: one of this user in
            the system's temporary folder.
        cache_bytes: what the downloaded shards may take.
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
        """The sample at a place in stored order."""
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} in a data set of {len(self)}")
        shard, row = locate_stored(self._ends, np.array([index]))
        return self.read(int(shard[0]), int(row[0]))

    def read(self, shard: int, row: int) -> dict[str, Any]:
        """A sample by shard and row.

        Returns:
            What ``decode`` made of it, and its ``key``.

        Raises:
            UserError: the shard is missing, or not what the manifest says.
        """
        return self._read(self._cache.open(shard), row)

    def read_rows(self, shards: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
        """Several samples, each as of `read`; a shard that many are in is opened, and looked at, once.

        Args:
            shards: int64 [n].
            rows: int64 [n], in the shards.
        """
        opened = {shard: self._cache.open(shard) for shard in dict.fromkeys(shards.tolist())}
        return [self._read(opened[shard], row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]

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
        """As of a `MixedDataset`."""
        return [self]

    @property
    def slots(self) -> np.ndarray:
        """As of a `MixedDataset`."""
        return np.array([NUM_SLOTS])

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded before they are read."""
        return self._cache.is_remote

    def prefetch(self, shards: np.ndarray) -> None:
        """Starts to download shards (int64, in the order in which they are wanted) in the background."""
        self._cache.prefetch(dict.fromkeys(shards.tolist()))

    def order(self, seed: int, global_batch: int, window: int) -> Order:
        """The order in which a training reads it."""
        return Order(self.counts, seed, num_streams(global_batch), window)


class MixedDataset:
    """Several data sets as one: the shards of the second are numbered after those of the first, and so on.

    Args:
        datasets: the data sets; a training needs samples in all of them.
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
        """As of a `ShardDataset`."""
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
        """As of a `ShardDataset`."""
        for dataset, (first, end) in zip(self.datasets, pairwise(self._first_shards), strict=True):
            dataset.prefetch(shards[(shards >= first) & (shards < end)] - first)

    def order(self, seed: int, global_batch: int, window: int) -> MixtureOrder:
        """The order in which a training reads it."""
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
    """The micro-batches of one rank, step by step and without end.

    Args:
        dataset: what to read.
        order: of this data set, see its ``order``.
        global_batch: G, samples a step over all ranks.
        micro_batch: most rows at once; None: the whole share.
        rank: 0 to ``world_size`` - 1.
        world_size: W.
        first_step: where to start; together with G, the loader's whole state.
        num_workers: processes that read and decode; 0: this one does.
        augment: changes samples by their positions.

    Yields:
        For each step ceil(share / micro_batch) batches of equal rows, the same number on every rank: the fields that
        ``decode`` returned, ``key``, and ``weight`` float32 [rows], 0 on rows that only fill up (all rows of a batch
        may be such where W does not divide G).

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
    """Samples of a data set in stored order, each once: rank r takes the r-th of W contiguous parts.

    Of more than are wanted, about one of each video from the first on: more videos than the first ones are of, out of
    few shards all the same. Of a mix that holds for each data set, and they come one after the other.

    Args:
        dataset: what to read.
        batch_size: rows of each batch, if a rank's part has as many.
        rank: 0 to ``world_size`` - 1.
        world_size: W.
        max_samples: how many to read over all ranks, at most; of a mix, each data set its share, and what one is short
            of from the others. None: all.
        num_workers: processes that read and decode; 0: this one does.

    Yields:
        Batches as those of `train_batches`, all of the same rows and the same number on every rank.

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
    """Collated batches by number: all that a loader worker knows."""

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
        except ClipmillError as error:  # raised by a worker, torch would bury its one line under a traceback
            return error
        if self._augment is not None:
            samples = [self._augment(*each) for each in zip(samples, place.positions.tolist(), strict=True)]
        return _collate(samples, place.weight)
