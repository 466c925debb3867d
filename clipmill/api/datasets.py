"""Clips, tokens and samples of a run as a torch data set, and their batches in training order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes, train_batches
from clipmill.shards.manifest import Kind, Manifest

__all__ = ["ClipDataset", "Loader", "open_dataset"]


def decode_sample(members: dict[str, memoryview]) -> dict[str, Any]:
    """Decodes the pixels and the codes of a prior's sample."""
    return {**decode_clip(members), **decode_codes(members)}


_DECODE = {"clips": decode_clip, "tokens": decode_codes, "samples": decode_sample}


def open_dataset(
    url: str,
    kind: Literal["clips", "tokens", "samples"] = "clips",
    split: str | None = None,
    *,
    cache_dir: str | Path | None = None,
) -> ClipDataset:
    """Opens a data set.

    Args:
        url: path or bucket URL of a data set (``runs/demo/clips/val``), or of a run.
        kind: which data set of a run to open; ignored if ``url`` is a data set.
        split: for ``clips`` and ``tokens`` of a run, ``train`` or ``val``; None opens ``train``. For ``samples``, the
            name of the set; None opens ``default``.
        cache_dir: local folder for downloads from a bucket; None uses a folder in the system's temporary folder.

    Raises:
        UserError: the data set is missing or damaged.
    """
    place = storage.absolute(url)
    inside = storage.join(place, kind, split or ("default" if kind == "samples" else "train"))
    for each in (place, inside):
        try:
            return ClipDataset(Manifest.load(each), None if cache_dir is None else Path(cache_dir))
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise UserError(
        f"there is no data set at {storage.shown(place)}, and no {inside.removeprefix(place + '/')} below it; name the "
        "folder of a data set, or the root of a run"
    )


class ClipDataset(Dataset[dict[str, Any]]):
    """The samples of a data set in stored order; create it with `open_dataset`. Shards are verified before reading.

    Attributes:
        kind: ``clips``, ``tokens`` or ``samples``.
        classes: names of the classes, sorted.
        manifest: the manifest: content of the data set, and how it was made.
    """

    def __init__(self, manifest: Manifest, cache_dir: Path | None = None) -> None:
        self.manifest = manifest
        self.kind: Kind = manifest.kind
        self.classes: list[str] = list(manifest.facts.get("classes") or [])
        self.shards = ShardDataset(manifest, _DECODE[manifest.kind], cache_dir)

    def __repr__(self) -> str:
        return f"ClipDataset({len(self)} {self.kind} at {storage.shown(self.manifest.url)})"

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Returns:
            ``key`` and ``label`` (None without classes); for clips and samples ``video``, uint8 [T, H, W, 3]; for
            tokens and samples ``codes``, int64 [t, h, w] or [t, h, w, M]; and ``meta``, ``actions``, ``text`` and
            ``frames``, if the sample has them.

        Raises:
            UserError: the sample's shard is missing or damaged.
            IndexError: the index is out of range.
        """
        sample = self.shards[index + len(self) if index < 0 else index]
        return {
            name: _tensor(value, name) if isinstance(value, np.ndarray) else value for name, value in sample.items()
        }

    def loader(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        state: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_window: int = 4096,
    ) -> Loader:
        """Yields batches endlessly, in the order of a training with this seed and batch size.

        Args:
            batch_size: samples in a batch, over all ranks.
            seed: seed of the order.
            state: number of batches already read; this is the whole state of a loader.
            rank: rank of this process.
            world_size: number of processes that read.
            num_workers: number of processes that load batches; 0 loads them in this process.
            shuffle_window: number of consecutive samples that are shuffled together.

        Raises:
            UserError: the data set is empty, or a number is out of range.
        """
        if not len(self):
            raise UserError(f"{storage.shown(self.manifest.url)} is empty; there is nothing to load")
        if batch_size < 1 or state < 0 or shuffle_window < 1 or not 0 <= rank < world_size:
            raise UserError(
                f"batch_size={batch_size}, state={state}, rank={rank} of {world_size}, shuffle_window={shuffle_window}"
                ": batch_size and shuffle_window must be at least 1, state at least 0, and rank below world_size"
            )
        order = self.shards.order(seed, batch_size, shuffle_window)
        batches = train_batches(
            self.shards,
            order,
            global_batch=batch_size,
            micro_batch=None,
            rank=rank,
            world_size=world_size,
            first_step=state,
            num_workers=num_workers,
        )
        return Loader(batches, state)


class Loader(Iterator[dict[str, Any]]):
    """An endless iterator over batches; create it with `ClipDataset.loader`.

    A batch holds tensors [rows, ...], lists (``key``, ``label``), and ``weight`` float32 [rows], which is 0 on rows
    that only pad a rank's share.

    Attributes:
        state: number of batches delivered; ``loader(..., state=state)`` continues after them.
    """

    def __init__(self, batches: Iterator[list[dict[str, Any]]], state: int) -> None:
        self._batches = batches
        self.state = state

    def __next__(self) -> dict[str, Any]:
        (batch,) = next(self._batches)
        self.state += 1
        return batch


def _tensor(array: np.ndarray, name: str) -> torch.Tensor:
    """Copies an array to a tensor: the memory of a shard must not be written to."""
    return torch.from_numpy(array.astype(np.int64) if name == "codes" else array.copy())
