"""Counter-based Gumbel noise: each number is a function of (seed, sample, position, code) only.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch's integer operations: the
seed is its key; the counter is (code div 4, position, sample's low word, its high word); code mod 4 chooses among the
four output words. No operation synchronises with the device.

A word w becomes the uniform u = (w + 1/2) / 2^32, and u becomes -log(-log u). The logarithms are computed with separate
torch additions, multiplications and divisions. IEEE 754 defines the rounding of each, and no compiler fuses two, so CPU
and GPU compute the same bits. `torch.log` differs between them in the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Noise", "philox"]

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LN2 = 0.6931471805599453


class Noise:
    """Standard Gumbel noise of some samples.

    Args:
        seed: 0 .. 2^64 - 1.
        indices: numbers of the samples, 0 .. 2^64 - 1 each.
        num_codes: K.
        device: where the noise is made.
    """

    def __init__(self, seed: int, indices: Sequence[int], num_codes: int, device: torch.device) -> None:
        self.key = (seed & _LOW, seed >> 32)
        words = [[index & _LOW for index in indices], [index >> 32 for index in indices]]
        self.samples = torch.tensor(words, device=device)[:, :, None, None]  # [2, B, 1, 1]
        self.num_samples, self.num_codes = len(indices), num_codes

    def at(self, first: int, num_positions: int) -> Tensor:
        """Noise of ``num_positions`` positions from ``first`` (below 2^32) on, float32 [B, positions, K]."""
        device = self.samples.device
        blocks = torch.arange(-(-self.num_codes // 4), device=device)
        positions = torch.arange(first, first + num_positions, device=device)[:, None]
        low, high = self.samples
        words = philox((blocks, positions, low, high), self.key)
        noise = torch.empty(*words[0].shape, 4, device=device)
        for place, word in enumerate(words):
            exponentials = _log(word.double().add_(0.5).mul_(2.0**-32)).neg_().float()
            torch.neg(_log(exponentials), out=noise[..., place])
        return noise.flatten(-2)[..., : self.num_codes]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: computes four words, int64 in 0 .. 2^32 - 1, for each counter.

    Args:
        counter: four words in the same form; they broadcast.
        key: two words.
    """
    # An int64 product keeps all 64 bits of two words, as its sign is one of them. A low half is only ever used by
    # exclusive or, so the bits above it stay until the end. In place, because a CPU takes longer to map new memory
    # than to compute on it.
    c0, c1, c2, c3 = (word.clone() for word in torch.broadcast_tensors(*counter))
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key
    for _ in range(10):
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, p1, c3, p0 = p1, c1, p0, c3
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0, c1.bitwise_and_(_LOW), c2, c3.bitwise_and_(_LOW)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal numbers, float64 (to 1e-10) or float32 (to 2e-7, absolute below 1)."""
    integer, mantissa_bits, sqrt_half = (
        (torch.int64, 52, 0x3FE6A09E667F3BCD) if x.dtype == torch.float64 else (torch.int32, 23, 0x3F3504F3)
    )
    bits = x.view(integer)
    exponent = (bits - sqrt_half).bitwise_right_shift_(mantissa_bits)
    m = (bits - (exponent << mantissa_bits)).view(x.dtype)  # sqrt(1/2) <= m < sqrt(2), x = m * 2^exponent
    s = (m - 1).div_(m.add_(1))
    z = torch.mul(s, s, out=m)
    # log m = 2 artanh s = s (2 + 2/3 z + 2/5 z^2 + ...), z < 0.0295
    series = z * (2 / 13)
    for odd in (11, 9, 7, 5, 3):
        series.add_(2 / odd).mul_(z)
    return series.add_(2).mul_(s).add_(exponent.to(x.dtype).mul_(_LN2))
