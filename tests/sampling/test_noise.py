from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipmill.sampling.noise import Noise, philox

CPU = torch.device("cpu")


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """Known answers of the authors' library Random123, philox4x32 with 10 rounds."""
    assert tuple(word.item() for word in philox(words(*counter), key)) == expected


def test_a_number_depends_on_seed_sample_position_and_code_alone() -> None:
    noise = Noise(5, [3, 9], 10, CPU).at(0, 8)
    assert noise.shape == (2, 8, 10)
    assert noise.dtype == torch.float32
    assert torch.equal(Noise(5, [9], 10, CPU).at(0, 8), noise[1:])
    assert torch.equal(Noise(5, [3, 9], 10, CPU).at(6, 2), noise[:, 6:])
    assert torch.equal(Noise(5, [3, 9], 5, CPU).at(0, 8), noise[..., :5])
    for other in (Noise(6, [3], 10, CPU), Noise(5 + 2**32, [3], 10, CPU), Noise(5, [3 + 2**32], 10, CPU)):
        assert not (other.at(0, 8) == noise[:1]).any()
    assert Noise(2**64 - 1, [2**64 - 1], 3, CPU).at(2**32 - 2, 2).isfinite().all()


def test_the_numbers_stay() -> None:
    """Every sample on disk was made from them."""
    noise = Noise(7, [3], 4, CPU).at(0, 2)[0]
    expected = torch.tensor(
        [[0.6476596, -0.736793756, -0.596506596, 0.671013832], [3.78706574, -0.506045461, -0.325834483, 0.635539472]]
    )
    assert torch.equal(noise, expected)


def test_it_is_gumbel_noise() -> None:
    noise = Noise(1, range(16), 256, CPU).at(0, 128)
    uniforms = torch.exp(-torch.exp(-noise.double())).flatten().sort().values.numpy()
    count = len(uniforms)
    distance = np.abs(uniforms - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %
    for dim in range(3):  # neighbours along samples, positions and codes
        first, second = noise.narrow(dim, 0, noise.shape[dim] - 1), noise.narrow(dim, 1, noise.shape[dim] - 1)
        assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.01


def test_the_logarithms_are_right_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = words(0, 1, 2**32 - 2, 2**32 - 1)
    monkeypatch.setattr("clipmill.sampling.noise.philox", lambda counter, key: ends)
    noise = Noise(0, [0], 4, CPU).at(0, 1).flatten()
    uniforms = [(word.item() + 0.5) / 2**32 for word in ends]
    exact = torch.tensor([-math.log(-math.log(uniform)) for uniform in uniforms])
    torch.testing.assert_close(noise, exact, rtol=2e-7, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: noise of a CPU and of a GPU is not compared here")
def test_a_gpu_makes_the_same_bits() -> None:
    here, there = (Noise(3, range(8), 1000, torch.device(kind)).at(5, 64) for kind in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
