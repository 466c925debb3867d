"""The positions that a decoder computes at once, known to the host or only to the device.

R: rows   n: positions   S: context, the first positions of the cache   M: heads of keys and values   D: channels of one
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.models.strided import StridedMask

__all__ = ["CONTEXT_MULTIPLE", "DevicePlaces", "HostPlaces", "Places"]

CONTEXT_MULTIPLE = 64
"""The context of `DevicePlaces`, and the length of a cache, are multiples of this."""
_SPLITS = 8
"""Parts in which one position reads its context on a GPU. Without the split, a few heads would occupy few
multiprocessors.
"""


@dataclass(frozen=True)
class HostPlaces:
    """Positions known to the host; tables and caches are sliced."""

    first: int
    count: int
    """N, the number of positions."""

    @property
    def context(self) -> int:
        """S."""
        return self.first + self.count

    def codebook(self, num_codebooks: int) -> int:
        """The codebook of the first position."""
        return self.first % num_codebooks

    def indices(self, device: torch.device) -> Tensor:
        """The positions, int64 [n]."""
        return torch.arange(self.first, self.context, device=device)

    def take(self, table: Tensor, dim: int) -> Tensor:
        """The entries of these positions."""
        return table.narrow(dim, self.first, self.count)

    def put(self, table: Tensor, dim: int, entries: Tensor) -> None:
        """Overwrites the entries of these positions."""
        table.narrow(dim, self.first, self.count).copy_(entries)

    def frames(self, per_frame: int, device: torch.device) -> Places:
        """The latent frame of each position; a frame has ``per_frame`` positions."""
        frame = self.first // per_frame
        if (self.context - 1) // per_frame == frame:
            return HostPlaces(frame, 1)
        return DevicePlaces(self.indices(device) // per_frame, 0, 0)

    def mask(self, device: torch.device) -> Tensor | None:
        """The positions of the context that each position may attend to, bool [n, S]; None for all."""
        if self.count == 1:
            return None
        return torch.ones(self.count, self.context, dtype=torch.bool, device=device).tril_(self.first)

    def seen(self, strided: StridedMask) -> tuple[Tensor | None, Tensor | None]:
        """The positions that may be attended to under a strided mask.

        Returns:
            The positions of the cache that any of the positions may attend to, int64 [S], None for the whole context;
            and for each position a mask over these, bool [n, S], None for all.
        """
        reads = strided.reads(self.first, self.context)
        return reads, None if self.count == 1 else strided.mask(self.indices(reads.device), reads)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of q [R, M, rows, D] to keys and values [R, M, S, D] under mask bool [rows, S]."""
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


@dataclass(frozen=True)
class DevicePlaces:
    """Positions known only to the device, so that one CUDA graph serves many positions."""

    positions: Tensor
    """Int64 [n], consecutive, below ``context``."""
    context: int
    """S, a multiple of `CONTEXT_MULTIPLE`."""
    first_codebook: int

    @property
    def count(self) -> int:
        """N, the number of positions."""
        return len(self.positions)

    def codebook(self, num_codebooks: int) -> int:
        """See `HostPlaces.codebook`."""
        return self.first_codebook

    def take(self, table: Tensor, dim: int) -> Tensor:
        """See `HostPlaces.take`."""
        return table.index_select(dim, self.positions)

    def put(self, table: Tensor, dim: int, entries: Tensor) -> None:
        """See `HostPlaces.put`."""
        table.index_copy_(dim, self.positions, entries)

    def frames(self, per_frame: int, device: torch.device) -> Places:
        """See `HostPlaces.frames`."""
        return DevicePlaces(self.positions // per_frame, 0, 0)

    def mask(self, device: torch.device) -> Tensor | None:
        """See `HostPlaces.mask`."""
        return torch.arange(self.context, device=device) <= self.positions[:, None]

    def seen(self, strided: StridedMask) -> tuple[Tensor | None, Tensor | None]:
        """See `HostPlaces.seen`."""
        return None, strided.mask(self.positions, torch.arange(self.context, device=self.positions.device))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """See `HostPlaces.attend`."""
        if self.count > 1 or mask is None:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        scores = (q @ keys.transpose(-1, -2)).float().mul_(q.shape[-1] ** -0.5)
        weights = scores.masked_fill_(~mask, -torch.inf).softmax(-1).to(q.dtype)
        parts = weights.unflatten(-1, (_SPLITS, -1)).transpose(2, 3) @ values.unflatten(2, (_SPLITS, -1))
        return parts.sum(2)


Places = HostPlaces | DevicePlaces
