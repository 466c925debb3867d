"""The block-sparse causal attention of the published sparse priors: a strided layout over the raster of codes.

Child et al., arXiv 1904.10509, section 4.2, for any number of axes, as in VideoGPT's published code. The raster is cut
into blocks of 32 positions. The blocks form a grid: the last axes of the latents are merged until they hold more than
one block. A block of queries attends to itself, to the 4 blocks before it, and to earlier blocks that differ from it in
exactly one axis of the grid, except the last. Inside its own block, a position attends to the positions up to itself.

No tensor of L x L elements is ever made: a table of blocks has 1,024 times fewer.

B: batch   N: heads   L: positions   R: blocks, L / 32   n: blocks that a block attends to   D: channels of a head
S: positions of a cache
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from clipmill.errors import UserError

__all__ = ["StridedMask", "strided_blocks"]

BLOCK = 32
"""Positions of a block, as published."""
NUM_LOCAL_BLOCKS = 4
"""Previous blocks that every block attends to, as published."""
_KERNEL_BLOCKS = 4
"""Blocks per side of a FlexAttention tile; its kernels need tiles of 128 positions."""
_LEAST_KERNEL_CHANNELS = 16
"""Least channels of a head that FlexAttention supports on CUDA."""


def strided_blocks(latent_shape: tuple[int, ...]) -> np.ndarray:
    """Which blocks (columns) each block (row) attends to, bool [R, R].

    Args:
        latent_shape: axes of the raster, slowest first.

    Raises:
        UserError: the raster cannot be cut into whole blocks.
    """
    grid = _grid(latent_shape)
    number = np.arange(math.prod(grid))
    places = np.unravel_index(number, grid)
    seen = number[:, None] - number <= NUM_LOCAL_BLOCKS
    for axis in range(len(grid) - 1):
        line = number - places[axis] * math.prod(grid[axis + 1 :])  # equal for blocks that differ in this axis only
        seen |= line[:, None] == line
    return seen & (number[:, None] >= number)


def _grid(latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the grid of blocks."""
    axis = len(latent_shape)
    merged = 1
    while axis and merged <= BLOCK:
        axis -= 1
        merged *= latent_shape[axis]
    if merged % BLOCK:
        raise UserError(
            f"prior.model.attention=strided cuts the codes into blocks of {BLOCK}, and latents of shape {latent_shape} "
            f"have rows of {merged}; set attention=full, or choose vqvae.model.downsample and data.clip so that they "
            "fit"
        )
    return *latent_shape[:axis], merged // BLOCK


class StridedMask(nn.Module):
    """The block layout of one prior, and attention with it.

    Args:
        latent_shape: axes of the raster.

    Raises:
        UserError: the raster cannot be cut into whole blocks.
    """

    blocks: Tensor
    order: Tensor
    inverse: Tensor
    columns: Tensor

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self._blocks = strided_blocks(latent_shape)
        counts = self._blocks.sum(1)
        order = np.argsort(counts, kind="stable")
        columns = np.zeros((len(counts), counts.max()), np.int64)
        for place, row in enumerate(order):
            columns[place, : counts[row]] = np.flatnonzero(self._blocks[row])
        edges = np.flatnonzero(np.diff(counts[order], prepend=0, append=0)).tolist()
        self.groups = [(int(counts[order[first]]), first, end) for first, end in pairwise(edges)]
        """Groups of blocks that attend to equally many: (n, first, end), a range of ``order``."""
        self.share = float(self._blocks.sum() / np.tri(len(counts)).sum())
        """Number of attended blocks, as a share of full causal attention."""
        for name, table in (
            ("blocks", self._blocks),
            ("order", order),
            ("inverse", order.argsort()),
            ("columns", columns),
        ):
            self.register_buffer(name, torch.tensor(table), persistent=False)
        self._tiles: BlockMask | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q, k, v [B, N, L, D] over all positions -> [B, N, L, D]."""
        if q.is_cuda and q.shape[-1] >= _LEAST_KERNEL_CHANNELS:
            return _attend_to_tiles(q, k, v, self.tiles)
        q, k, v = (part.unflatten(2, (-1, BLOCK)) for part in (q, k, v))
        # Without checkpointing, the gathered keys and values, n times the originals, would be kept for the backward
        # pass.
        run: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False) if q.requires_grad else _call
        mixed = [run(self._attend_to_blocks, q, k, v, *group) for group in self.groups]
        return torch.cat(mixed, 2).index_select(2, self.inverse).flatten(2, 3)

    def _attend_to_blocks(self, q: Tensor, k: Tensor, v: Tensor, count: int, first: int, end: int) -> Tensor:
        """Attention of one of the ``groups``, for q, k, v [B, N, R, 32, D]."""
        queries = q.index_select(2, self.order[first:end]).flatten(1, 2)
        columns = self.columns[first:end, :count].flatten()
        keys, values = (part.index_select(2, columns).unflatten(2, (-1, count)).flatten(3, 4) for part in (k, v))
        # The last block that a block attends to is its own.
        mask = q.new_ones(BLOCK, count * BLOCK, dtype=torch.bool).tril_((count - 1) * BLOCK)
        mixed = F.scaled_dot_product_attention(queries, keys.flatten(1, 2), values.flatten(1, 2), attn_mask=mask)
        return mixed.unflatten(1, (q.shape[1], -1))

    @property
    def tiles(self) -> BlockMask:
        """The layout for FlexAttention, on the device of ``blocks``; made once, outside compiled code."""
        if self._tiles is None or self._tiles.kv_indices.device != self.blocks.device:
            self._tiles = _tiles(self._blocks, self.blocks)
        return self._tiles

    def reads(self, first: int, end: int) -> Tensor:
        """Cached positions that the positions ``first`` to ``end`` - 1 attend to, int64 [S], ascending."""
        rows = self._blocks[first // BLOCK : -(-end // BLOCK)]
        seen = np.flatnonzero(rows.any(0))[:, None] * BLOCK + np.arange(BLOCK)
        return torch.from_numpy(seen[seen < end]).to(self.blocks.device)

    def mask(self, positions: Tensor, cached: Tensor) -> Tensor:
        """Which cached positions int64 [S] each of ``positions`` int64 [n] attends to, bool [n, S]."""
        seen = self.blocks.index_select(0, positions // BLOCK).index_select(1, cached // BLOCK)
        return seen & (cached <= positions[:, None])


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


# ----------------------------------------------------------------------------------------- FlexAttention


def _tiles(blocks: np.ndarray, on_device: Tensor) -> BlockMask:
    """Blocks [R, R] as tiles of 128 x 128 positions; ``on_device`` has the same values."""
    num_tiles = -(-len(blocks) // _KERNEL_BLOCKS)
    padding = num_tiles * _KERNEL_BLOCKS - len(blocks)
    tiles = np.pad(blocks, ((0, padding), (0, padding))).reshape(num_tiles, _KERNEL_BLOCKS, num_tiles, _KERNEL_BLOCKS)
    whole = tiles.all((1, 3)) & ~np.eye(num_tiles, dtype=bool)
    partial = tiles.any((1, 3)) & ~whole

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return on_device[query // BLOCK, key // BLOCK] & (query >= key)

    length = len(blocks) * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed(partial, on_device.device),
        *_listed(whole, on_device.device),
        BLOCK_SIZE=_KERNEL_BLOCKS * BLOCK,
        mask_mod=mask,
        seq_lengths=(length, length),
    )


def _listed(tiles: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of tiles per row, int32 [1, 1, rows], and the columns with those of tiles first, int32 [1, 1, rows,
    columns].
    """
    counts, columns = tiles.sum(1), np.argsort(~tiles, axis=1, kind="stable")
    as_int32 = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    return as_int32(counts)[None, None], as_int32(columns)[None, None]


@functools.cache
def _compiled_kernel() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _attend_to_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: BlockMask) -> Tensor:
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=tiles)
    # Validation runs eagerly (see `Engine.evaluate`), where FlexAttention would write out L x L scores.
    with torch.compiler.set_stance("default"):
        return _compiled_kernel()(q, k, v, block_mask=tiles)
