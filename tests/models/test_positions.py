from __future__ import annotations

import math

import pytest
import torch

from clipmill.models.positions import axial_tables, raster, rotate, rotations

SHAPE = (3, 4, 5)


def test_scores_depend_on_offsets_alone() -> None:
    """q at p and k at p' see only p - p', whichever the two places are."""
    table = rotations(SHAPE, 12, base=100.0).view(2, *SHAPE, 6)
    q, k = torch.randn(2, 12)

    def score(at: tuple[int, int, int], seen: tuple[int, int, int]) -> float:
        return float(rotate(q, table[:, *at]) @ rotate(k, table[:, *seen]))

    assert math.isclose(score((2, 3, 1), (1, 1, 4)), score((1, 2, 0), (0, 0, 3)), abs_tol=1e-5)
    for other in ((1, 1, 3), (1, 0, 4), (0, 1, 4)):  # another offset on one axis
        assert not math.isclose(score((2, 3, 1), (1, 1, 4)), score((2, 3, 1), other), abs_tol=1e-3)


def test_axes_take_the_frequencies_in_turn() -> None:
    cos, sin = rotations(SHAPE, 8, base=16.0)
    angles = torch.atan2(sin, cos).view(*SHAPE, 4)
    expected = torch.tensor([1.0, 0.5, 0.25, 0.125])  # 16 ** (-2 i / 8)
    torch.testing.assert_close(angles[1, 1, 1], expected)
    torch.testing.assert_close(angles[1, 0, 0], expected * torch.tensor([1.0, 0, 0, 1]))
    torch.testing.assert_close(angles[0, 2, 0], expected * torch.tensor([0, 2.0, 0, 0]))


def test_rotation_keeps_lengths_and_dtype() -> None:
    table = rotations(SHAPE, 12, base=100.0)
    x = torch.randn(2, 60, 12)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_raster_concatenates_the_axes_in_raster_order() -> None:
    tables = axial_tables(SHAPE, 10)
    assert [tuple(table.shape) for table in tables] == [(3, 4), (4, 3), (5, 3)]
    place = 1 * 20 + 2 * 5 + 3
    torch.testing.assert_close(raster(tables)[place], torch.cat((tables[0][1], tables[1][2], tables[2][3])))


@pytest.mark.parametrize("dim", [64, 65, 66])
def test_the_axes_share_a_width_that_three_does_not_divide(dim: int) -> None:
    positions = raster(axial_tables(SHAPE, dim))
    assert positions.shape == (60, dim)
    assert len(positions.unique(dim=0)) == 60
