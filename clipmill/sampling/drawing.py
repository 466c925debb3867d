"""The codes of a batch while they are drawn: what the sequential and the parallel decoder share.

B: samples   R: rows of the prior, B or, under guidance, 2 B   n: positions at once   L: all positions   K: codes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipmill.errors import UserError
from clipmill.models.decoding import CachedPrior
from clipmill.models.places import HostPlaces, Places
from clipmill.models.prior import Prior
from clipmill.sampling.filters import Filters, draw
from clipmill.sampling.noise import Noise

if TYPE_CHECKING:
    from clipmill.sampling.sequential import DeviceStep

__all__ = ["Drawing"]

_NOISE_ELEMENTS = 2**19
"""Noise made at once: enough to pay for its operations, little enough for a cache."""


class Drawing:
    """Batches of one size and one set of filters, one after another, in the same tensors; `begin` starts each.

    Args:
        prior: in eval mode.
        cached: the same, ready for R rows; with guidance the second half of them goes without what training hid.
        num_samples: B.
        guidance: see `clipmill.sampling.generate`.
        filters: of the draws.

    Attributes:
        codes: int64 [B, L].
        num_given: positions that are decided when a batch begins.
        step: of the sequential decoder on a GPU, with its CUDA graphs.
    """

    def __init__(self, prior: Prior, cached: CachedPrior, num_samples: int, guidance: float, filters: Filters) -> None:
        self.cached, self.filters, self.guidance = cached, filters, guidance
        self.num_samples, self.num_positions = num_samples, prior.num_positions
        self.num_frames, self.num_codes = prior.latent_shape[0], prior.num_codes
        self.num_codebooks, self.device = cached.num_codebooks, cached.rows.device
        self.copies = cached.num_rows // num_samples
        self.per_frame = math.prod(prior.latent_shape[1:])
        self.temperatures: Tensor | None = None  # [L, 1]
        if filters.temperature != 1.0:
            self.temperatures = torch.ones(self.num_positions, 1, device=self.device)
        self.codes = torch.zeros(num_samples, self.num_positions, dtype=torch.int64, device=self.device)
        self.health = torch.zeros(num_samples, device=self.device)
        self.step: DeviceStep | None = None

    def begin(
        self,
        noise: Noise,
        prefix: Tensor | None = None,
        first_frame: int = 0,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Starts a batch; ``cached`` has begun with its labels and conditions.

        Args:
            noise: of the B samples.
            prefix: codes of the first positions, int64 [B, P]; None: nothing is given.
            first_frame: latent frame of the whole video at which the batch begins.
            on_progress: gets the number of positions drawn since its last call, about once a latent frame.
        """
        self.noise, self.offset = noise, first_frame * self.per_frame
        self.noise_block, self.noise_first = torch.empty(self.num_samples, 0, self.num_codes), 0
        if self.temperatures is not None:
            by_frame = torch.tensor(self.filters.temperatures(first_frame, self.num_frames), device=self.device)
            self.temperatures.copy_(by_frame.repeat_interleave(self.per_frame)[:, None])
        self.codes.zero_()
        self.health.zero_()
        self.num_given = 0 if prefix is None else prefix.shape[1]
        self._on_progress, self._num_told = on_progress, self.num_given
        if prefix is not None and self.num_given:
            self.codes[:, : self.num_given] = prefix
            self.cached.prefill(prefix.repeat(self.copies, 1))

    def tell(self, num_drawn: int) -> None:
        """Reports progress when the first ``num_drawn`` positions are drawn; on a GPU, when they are on their way."""
        enough = num_drawn - self._num_told >= self.per_frame or num_drawn == self.num_positions
        if self._on_progress is not None and enough:
            self._on_progress(num_drawn - self._num_told)
            self._num_told = num_drawn

    @property
    def noise_positions(self) -> int:
        """Positions whose noise is made at once."""
        return max(1, _NOISE_ELEMENTS // (self.num_samples * self.num_codes))

    def noise_at(self, places: HostPlaces) -> Tensor:
        """Float32 [B, n, K]."""
        first = places.first - self.noise_first
        if first < 0 or first + places.count > self.noise_block.shape[1]:
            first, count = 0, max(places.count, self.noise_positions)
            self.noise_first = places.first
            count = min(count, self.num_positions - places.first)
            self.noise_block = self.noise.at(self.offset + places.first, count)
        return self.noise_block[:, first : first + places.count]

    def logits(self, places: Places) -> Tensor:
        """Of some positions given the codes so far, guided and divided by the temperature, float32 [B, n, K]."""
        logits = self.cached.logits(places)
        if self.copies == 2:
            with_all, without = logits.chunk(2)
            logits = without + self.guidance * (with_all - without)
        return logits if self.temperatures is None else logits / places.take(self.temperatures, 0)

    def draw(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Codes int64 [B, n] from what `logits` and `noise_at` gave."""
        return draw(logits, noise, self.filters)

    def put(self, places: Places, codes: Tensor) -> None:
        """Notes the codes int64 [B, n], which later positions follow."""
        places.put(self.codes, 1, codes)
        self.cached.put(places, codes.repeat(self.copies, 1) if self.copies > 1 else codes)

    def examine(self, logits: Tensor) -> None:
        """Notes whether logits [B, n, K] are finite; the host looks once, at the end."""
        # 0 times a sum is not a number where the sum is not finite, and stays so.
        self.health += logits.sum((1, 2)) * 0

    def require_finite(self, indices: Sequence[int]) -> None:
        """Looks at what was examined.

        Raises:
            UserError: logits of a sample were not finite.
        """
        sick = self.health.isnan().nonzero().flatten().tolist()
        if sick:
            raise UserError(
                f"sample {indices[sick[0]]}: the logits of the prior are not finite; its weights are damaged, or "
                "sample.guidance is too large or sample.temperature too small"
            )
