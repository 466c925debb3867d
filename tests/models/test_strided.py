"""The strided attention of sparse priors: its layout, its kernels, and priors that use it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from clipmill.config import PriorModelConfig
from clipmill.errors import UserError
from clipmill.models.prior import Prior
from clipmill.models.strided import StridedMask, strided_blocks
from clipmill.sampling.generate import generate
from tests.models.published_prior import blocks_seen, positions_seen
from tests.models.test_decoding import WAYS, assert_equal_logits, cached_logits

LAYOUTS = [(4, 8, 8), (2, 16, 16), (2, 8, 64)]
"""Their blocks make grids of (4, 2), (2, 8) and (2, 8, 2)."""
layouts = pytest.mark.parametrize("shape", LAYOUTS)


def stirred(shape: tuple[int, ...], num_layers: int = 2) -> Prior:
    """Every parameter away from its start."""
    config = PriorModelConfig(
        hidden_dim=24, num_heads=2, num_layers=num_layers, dropout=0, attention="strided", attention_dropout=0
    )
    prior = Prior(config, shape, num_codes=11, codebook=torch.randn(11 * math.prod(shape[3:]), 5)).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return prior


@pytest.mark.parametrize("shape", [*LAYOUTS, (8, 32, 32), (2, 4, 4), (1, 8, 8), (2, 3, 4, 32), (4, 4, 4, 2)])
def test_the_layout_is_the_published_one(shape: tuple[int, ...]) -> None:
    blocks = strided_blocks(shape)
    assert [np.flatnonzero(row).tolist() for row in blocks] == blocks_seen(shape)
    assert StridedMask(shape).share == pytest.approx(blocks.sum() / (len(blocks) * (len(blocks) + 1) / 2))


@pytest.mark.parametrize("shape", [(4, 6, 6), (2, 4, 2), (1, 3, 11)])
def test_latents_that_make_no_whole_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"blocks of 32, and latents of shape .* set attention=full"):
        strided_blocks(shape)


@layouts
def test_it_is_attention_under_a_mask_with_its_gradients(shape: tuple[int, ...]) -> None:
    inputs = [torch.randn(2, 3, math.prod(shape), 4, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, math.prod(shape), 4)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=positions_seen(shape))
    mixed = StridedMask(shape)(*inputs)
    torch.testing.assert_close(mixed, expected)
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (mixed, expected))
    for ours, others in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, others)


@pytest.mark.parametrize("shape", [*LAYOUTS, (3, 2, 32)])
def test_tiles_of_the_kernel_hold_the_layout(shape: tuple[int, ...]) -> None:
    """FlexAttention skips tiles that are not listed, and looks at no mask in those listed as whole."""
    length, seen, tiles = math.prod(shape), positions_seen(shape), StridedMask(shape).tiles
    assert torch.equal(create_mask(tiles.mask_mod, 1, 1, length, length, "cpu")[0, 0], seen)
    side = tiles.BLOCK_SIZE[0]
    padded = F.pad(seen, (0, -length % side, 0, -length % side))
    by_tile = padded.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(2)
    whole = torch.zeros(by_tile.shape[:2], dtype=torch.bool)
    partial = whole.clone()
    for listed, counts, columns in (
        (partial, tiles.kv_num_blocks, tiles.kv_indices),
        (whole, tiles.full_kv_num_blocks, tiles.full_kv_indices),
    ):
        for row, count in enumerate(counts[0, 0]):
            listed[row, columns[0, 0, row, :count].long()] = True
    assert not (whole & partial).any()
    assert torch.equal(whole | partial, by_tile.any(2))
    assert not (whole & ~by_tile.all(2)).any()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keys=None):  # type: ignore[no-untyped-def]
        made = function(*arguments, **(keys or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return made


def test_nothing_has_as_many_elements_as_there_are_pairs_of_positions() -> None:
    shape = (8, 32, 32)
    length = math.prod(shape)
    inputs = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
    with Largest() as largest:
        StridedMask(shape)(*inputs).sum().backward()
    assert length * 4 < largest.num_elements < length**2 / 64


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [*LAYOUTS, (2, 4, 8, 2)])
def test_cached_logits_equal_the_full_pass(shape: tuple[int, ...], way: str) -> None:
    prior, codes = stirred(shape, num_layers=1), torch.randint(11, (1, *shape))
    num_given = math.prod(shape) - 60  # the last positions suffice, and cross a block
    assert_equal_logits(cached_logits(prior, codes, None, way=way, num_given=num_given), prior(codes)[:, num_given:])


def test_both_decoders_draw_the_same_codes() -> None:
    prior = stirred((2, 4, 16))
    sequential, parallel = (
        generate(prior, seed=1, indices=range(2), decoder=way) for way in ("sequential", "parallel")
    )
    assert torch.equal(sequential, parallel)


def test_it_learns() -> None:
    shape = (2, 4, 16)
    prior = stirred(shape)
    codes = torch.arange(math.prod(shape)).remainder(11).view(1, *shape).repeat(2, 1, 1, 1)
    optimizer = torch.optim.Adam(prior.train().parameters(), 1e-2)
    for _ in range(30):
        loss = prior.loss(codes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"style": "modern", "attention_dropout": 0}, "needs style=videogpt"), ({}, "set attention_dropout=0")],
)
def test_settings_that_do_not_fit_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorModelConfig.model_validate({"attention": "strided", **keys})
