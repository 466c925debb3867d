"""Clips, tokens and samples of a run as a torch data set, and batches of them in the order of a training."""

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
    """A sample of a prior: its pixels and its codes."""
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
        kind: of a run, which of its data sets.
        split: of a run's ``clips`` and ``tokens``, ``train`` (None) or ``val``; of its ``samples``, their name
            (None is ``default``).
        cache_dir: local folder for what is downloaded from a bucket; None is one in the system's temporary folder.

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
        "folder of one, or the root of a run"
    )


class ClipDataset(Dataset[dict[str, Any]]):
    """The samples of a data set in stored order; made by `open_dataset`. Each shard is verified before it is read.

    Attributes:
        kind: ``clips``, ``tokens`` or ``samples``.
        classes: names of the classes, sorted.
        manifest: what is in it, and how it was made.
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
            ``key`` and ``label`` (None without classes); of clips and samples ``video`` uint8 [T, H, W, 3]; of tokens
            and samples ``codes`` int64 [t, h, w] or [t, h, w, M]; ``meta``, ``actions``, ``text`` and ``frames``, as
            far as they are there.

        Raises:
            UserError: its shard is missing or damaged.
            IndexError: there are fewer samples.
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
        """Batches in the order in which a training with this seed and batch reads them, without end.

        Args:
            batch_size: samples of a batch, over all ranks.
            seed: of the order.
            state: batches that have been read already: the whole state of a loader.
            rank: of this process.
            world_size: processes that read.
            num_workers: processes that load; 0 loads in this one.
            shuffle_window: samples among which a stream is shuffled.

        Raises:
            UserError: the data set is empty, or a number is out of range.
        """
        if not len(self):
            raise UserError(f"{storage.shown(self.manifest.url)} is empty; there is nothing to load")
        if batch_size < 1 or state < 0 or shuffle_window < 1 or not 0 <= rank < world_size:
            raise UserError(
                f"batch_size={batch_size}, state={state}, rank={rank} of {world_size}, shuffle_window={shuffle_window}"
                ": batch_size and shuffle_window are from 1 on, state from 0 on, rank below world_size"
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
    """Batches without end; made by `ClipDataset.loader`.

    A batch holds tensors [rows, ...] and lists (``key``, ``label``), and ``weight`` float32 [rows], 0 on rows that only
    fill up a rank's share.

    Attributes:
        state: batches delivered so far; ``loader(..., state=state)`` goes on behind them.
    """

    def __init__(self, batches: Iterator[list[dict[str, Any]]], state: int) -> None:
        self._batches = batches
        self.state = state

    def __next__(self) -> dict[str, Any]:
        (batch,) = next(self._batches)
        self.state += 1
        return batch


def _tensor(array: np.ndarray, name: str) -> torch.Tensor:
    """A copy: what lies in a shard must not be written to."""
    return torch.from_numpy(array.astype(np.int64) if name == "codes" else array.copy())
