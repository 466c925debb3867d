"""State of a batch while its codes are drawn, shared by the sequential and the parallel decoder.

B: samples   R: rows of the prior (B, or 2 B with guidance)   n: positions in one pass   L: all positions   K: codes
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
"""Elements of noise computed at once: enough to amortise the operations, few enough to stay in a CPU's cache."""


class Drawing:
    """Draws batches of one size with the same filters, one after another, in the same tensors; `begin` starts each.

    Args:
        prior: the prior in eval mode.
        cached: the prior prepared for R rows; with guidance, the second half of the rows lacks class and condition.
        num_samples: B.
        guidance: see `clipmill.sampling.generate`.
        filters: filters between logits and draws.

    Attributes:
        codes: int64 [B, L].
        num_given: number of positions that are known when a batch begins.
        step: the sequential decoder's step on a GPU, with its CUDA graphs.
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
        """Starts a batch. ``cached`` must already have begun with the batch's labels and condition.

        Args:
            noise: noise of the B samples.
            prefix: codes of the first positions, int64 [B, P]; None draws all positions.
            first_frame: latent frame of the whole video at which the batch begins.
            on_progress: called about once a latent frame, with the number of positions drawn since its last call.
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
        """Reports that the first ``num_drawn`` positions are drawn (on a GPU: launched), about once a latent frame."""
        enough = num_drawn - self._num_told >= self.per_frame or num_drawn == self.num_positions
        if self._on_progress is not None and enough:
            self._on_progress(num_drawn - self._num_told)
            self._num_told = num_drawn

    @property
    def noise_positions(self) -> int:
        """Number of positions whose noise is computed at once."""
        return max(1, _NOISE_ELEMENTS // (self.num_samples * self.num_codes))

    def noise_at(self, places: HostPlaces) -> Tensor:
        """Noise of some positions, float32 [B, n, K]."""
        first = places.first - self.noise_first
        if first < 0 or first + places.count > self.noise_block.shape[1]:
            first, count = 0, max(places.count, self.noise_positions)
            self.noise_first = places.first
            count = min(count, self.num_positions - places.first)
            self.noise_block = self.noise.at(self.offset + places.first, count)
        return self.noise_block[:, first : first + places.count]

    def logits(self, places: Places) -> Tensor:
        """Logits of some positions given the codes so far, after guidance and temperature, float32 [B, n, K]."""
        logits = self.cached.logits(places)
        if self.copies == 2:
            with_all, without = logits.chunk(2)
            logits = without + self.guidance * (with_all - without)
        return logits if self.temperatures is None else logits / places.take(self.temperatures, 0)

    def draw(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Draws codes int64 [B, n] from the results of `logits` and `noise_at`."""
        return draw(logits, noise, self.filters)

    def put(self, places: Places, codes: Tensor) -> None:
        """Stores codes int64 [B, n]; later positions depend on them."""
        places.put(self.codes, 1, codes)
        self.cached.put(places, codes.repeat(self.copies, 1) if self.copies > 1 else codes)

    def examine(self, logits: Tensor) -> None:
        """Records whether logits [B, n, K] are finite; the host reads the result once, at the end."""
        # 0 times a sum is NaN if the sum is not finite, and NaN persists.
        self.health += logits.sum((1, 2)) * 0

    def require_finite(self, indices: Sequence[int]) -> None:
        """Checks the results of `examine`.

        Raises:
            UserError: logits of a sample were not finite.
        """
        sick = self.health.isnan().nonzero().flatten().tolist()
        if sick:
            raise UserError(
                f"sample {indices[sick[0]]}: the logits of the prior are not finite; its weights are damaged, or "
                "sample.guidance is too large or sample.temperature too small"
            )
