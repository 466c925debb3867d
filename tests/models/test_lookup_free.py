from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clipmill.models.lookup_free import FiniteScalar, LookupFree
from tests.models.processes import run_ranks


@pytest.mark.parametrize(
    "quantizer",
    [FiniteScalar((8, 5, 3), 1), FiniteScalar((4, 3), 2), LookupFree(5, 2, 0.01), LookupFree(5, 2, 1.0, True)],
)
def test_codes_are_the_places_of_the_embeddings(quantizer: FiniteScalar | LookupFree) -> None:
    num_codebooks, num_codes = quantizer.num_codebooks, quantizer.num_codes
    table = quantizer.codebook.view(num_codebooks, num_codes, -1)
    assert table.abs().max() == 1
    assert len(table[0].unique(dim=0)) == num_codes
    rows = torch.randn(200, num_codebooks * table.shape[-1]) * 2
    quantized = quantizer(rows)
    assert quantized.codes.shape == (200, num_codebooks)
    assert (quantized.codes.min() >= 0) & (quantized.codes.max() < num_codes)
    torch.testing.assert_close(quantizer.embed(quantized.codes), quantized.latents)
    looked_up = [table[m][quantized.codes[:, m]] for m in range(num_codebooks)]
    torch.testing.assert_close(torch.cat(looked_up, 1), quantized.latents)
    expected = [torch.bincount(quantized.codes[:, m], minlength=num_codes) for m in range(num_codebooks)]
    assert torch.equal(quantized.counts, torch.cat(expected).float())


def test_every_level_is_reached_and_zero_is_the_middle() -> None:
    quantizer = FiniteScalar((8, 5), 1)
    sweep = torch.linspace(-9, 9, 4001)
    values = quantizer(torch.stack((sweep, sweep), 1)).latents
    assert [len(channel.unique()) for channel in values.T] == [8, 5]
    assert quantizer(torch.zeros(1, 2)).latents.tolist() == [[0, 0]]
    assert (values.diff(dim=0) >= 0).all()


def test_gradients_pass_rounding_and_sign() -> None:
    for quantizer, dim in ((FiniteScalar((8, 5, 3), 1), 3), (LookupFree(4, 1, 0.01), 4)):
        rows = torch.randn(32, dim, requires_grad=True)
        quantizer(rows).latents.sum().backward()
        assert (rows.grad > 0).all()


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_entropies_are_those_of_the_whole_table(temperature: float) -> None:
    """Against the definition, with the N x K table that the factorised form avoids."""
    quantizer = LookupFree(5, 1, temperature).double()
    rows = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    distances = torch.cdist(rows, quantizer.codebook.double()).square()
    shares = (-distances / temperature).softmax(1)
    certainty = torch.special.entr(shares).sum(1).mean()
    variety = torch.special.entr(shares.mean(0)).sum()
    expected = (certainty - variety) / 5
    (expected_grad,) = torch.autograd.grad(expected, rows)
    entropy = quantizer(rows).entropy
    (grad,) = torch.autograd.grad(entropy, rows)
    torch.testing.assert_close(entropy, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("far", [4.0, 9.0, 60.0])
def test_entropies_of_certain_rows_have_a_finite_gradient(far: float) -> None:
    """Of rows so far from 0 that a bit's probability rounds to 1, and those of most codes to 0."""
    rows = torch.full((32, 6), far)
    rows[::2, 0] = -far
    rows.requires_grad_()
    entropy = LookupFree(6, 1, 0.01)(rows).entropy
    entropy.backward()
    assert entropy.item() == pytest.approx(-math.log(2) / 6, abs=2e-3)
    assert rows.grad.isfinite().all()


def test_a_collapse_costs_its_share_of_the_losss_range() -> None:
    """16 of 256 codes carry 4 of 8 bits: half of the range, which a temperature of 2 hid from soft rows."""
    rows = torch.randn(8192, 8)
    collapsed = torch.cat((rows[:, :4], rows[:, 4:].abs()), 1)

    def cost(temperature: float) -> float:
        spread, few = (LookupFree(8, 1, temperature)(each).entropy.item() for each in (rows, collapsed))
        return (few - spread) / math.log(2)

    assert cost(0.01) == pytest.approx(0.5, abs=0.02)
    assert cost(2.0) < 0.2


def test_rows_on_a_sphere_cannot_run_away() -> None:
    quantizer = LookupFree(4, 2, 0.01, spherical=True)
    rows = torch.randn(64, 8)
    near, far = quantizer(rows), quantizer(rows * 1000)
    torch.testing.assert_close(near.commitment, far.commitment)
    assert torch.equal(near.codes, far.codes)
    assert far.commitment.max() < 2


def test_a_quarter_of_a_million_codes_need_no_table() -> None:
    quantizer = LookupFree(18, 1, 0.01)
    quantized = quantizer(torch.randn(512, 18))
    assert -math.log(2) <= quantized.entropy <= math.log(2)
    assert quantized.counts.sum() == 512


def entropy_of_part(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(4)) * 2
    mine = rows.chunk(world_size)[rank].clone().requires_grad_()
    entropy = LookupFree(6, 1, 1.0)(mine).entropy
    entropy.backward()
    return entropy.detach(), mine.grad / world_size  # as the optimizer averages over ranks


def test_entropy_is_the_whole_batchs(tmp_path: Path) -> None:
    value, grad = entropy_of_part(0, 1)
    results = run_ranks(entropy_of_part, 2, tmp_path)
    for rank_value, _ in results:
        torch.testing.assert_close(rank_value, value)
    torch.testing.assert_close(torch.cat([rank_grad for _, rank_grad in results]), grad)
