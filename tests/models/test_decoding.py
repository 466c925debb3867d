from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from clipmill.models.decoding import CachedPrior
from clipmill.models.places import CONTEXT_MULTIPLE, DevicePlaces, HostPlaces, Places
from clipmill.models.prior import Prior
from tests.models import test_conditioning, test_prior

WAYS = ("sequential", "windows", "whole", "device", "device-windows")
ways = pytest.mark.parametrize("way", WAYS)


def places_of(way: str, first: int, length: int, num_codebooks: int) -> Iterator[Places]:
    """Positions first .. length - 1 as a decoder computes them."""
    if way == "whole":
        yield HostPlaces(first, length - first)
        return
    size = {"sequential": 1, "windows": 4, "device": 1, "device-windows": 3}[way]
    for start in range(first, length, size):
        count = min(size, length - start)
        if way.startswith("device"):
            context = -(-(start + count) // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
            yield DevicePlaces(torch.arange(start, start + count), context, start % num_codebooks)
        else:
            yield HostPlaces(start, count)


def cached_logits(
    prior: Prior,
    codes: torch.Tensor,
    label: torch.Tensor | None,
    condition: torch.Tensor | None = None,
    way: str = "sequential",
    num_given: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits of the positions that are not given, float [B, L - given, K]."""
    cached, codes = CachedPrior(prior, len(codes), label, condition, dtype), codes.flatten(1)
    if num_given:
        cached.prefill(codes[:, :num_given])
    logits = []
    for places in places_of(way, num_given, codes.shape[1], cached.num_codebooks):
        first = num_given + sum(part.shape[1] for part in logits)
        cached.put(HostPlaces(first, places.count), codes[:, first : first + places.count])
        logits.append(cached.logits(places))
    return torch.cat(logits, 1)


def assert_equal_logits(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@torch.no_grad()
@ways
@test_prior.styles
@test_prior.shapes
@pytest.mark.parametrize("num_classes", [0, 3])
def test_cached_logits_equal_the_full_pass(num_classes: int, style: str, shape: tuple[int, ...], way: str) -> None:
    prior, codes = test_prior.stirred(num_classes, style, shape=shape), test_prior.some_codes(shape=shape)
    label = torch.tensor([2, 0, 1]) if num_classes else None
    assert_equal_logits(cached_logits(prior, codes, label, way=way), prior(codes, label))


@torch.no_grad()
@ways
@test_conditioning.styles
@test_conditioning.conditions
@pytest.mark.parametrize("num_classes", [0, 3])
def test_cached_logits_of_a_conditioned_prior_equal_the_full_pass(
    condition: str, style: str, num_classes: int, way: str
) -> None:
    prior, codes = test_conditioning.stirred(condition, style, num_classes), test_conditioning.some_codes()
    told = test_conditioning.tell(condition)
    label = torch.tensor([2, 0, 1]) if num_classes else None
    expected = prior(codes, label, told)
    for num_given in (0, 6):
        logits = cached_logits(prior, codes, label, told, way, num_given)
        assert_equal_logits(logits, expected[:, num_given:])


@torch.no_grad()
@test_prior.styles
def test_a_long_prefix_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    monkeypatch.setattr("clipmill.models.decoding._PREFILL_POSITIONS", 5)
    prior, codes = test_prior.stirred(style=style), test_prior.some_codes()
    assert_equal_logits(cached_logits(prior, codes, None, num_given=12), prior(codes)[:, 12:])


@torch.no_grad()
@test_prior.styles
@pytest.mark.parametrize("num_classes", [0, 3])
def test_bfloat16_stays_near_float32(style: str, num_classes: int) -> None:
    prior, codes = test_prior.stirred(num_classes, style), test_prior.some_codes()
    label = torch.tensor([2, 0, 1]) if num_classes else None
    coarse = cached_logits(prior, codes, label, dtype=torch.bfloat16)
    assert coarse.dtype == torch.float32
    expected = prior(codes, label)
    assert (coarse - expected).square().mean() < 1e-3 * expected.square().mean()


@torch.no_grad()
@test_prior.styles
def test_a_window_computed_again_with_other_guesses_leaves_no_trace(style: str) -> None:
    prior, codes = test_prior.stirred(style=style), test_prior.some_codes().flatten(1)
    cached = CachedPrior(prior, 3, None, None, torch.float32)
    window = HostPlaces(0, math.prod(test_prior.SHAPE))
    cached.put(window, (codes + 1) % 11)
    cached.logits(window)
    cached.put(window, codes)
    assert_equal_logits(cached.logits(window), prior(codes.view(3, *test_prior.SHAPE)))


@torch.no_grad()
@test_prior.styles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_layout_of_weights_gives_the_same_logits(style: str, dtype: torch.dtype) -> None:
    prior, codes = test_prior.stirred(style=style), test_prior.some_codes()[:1].flatten(1)
    logits = []
    for step_rows in (1, 16):
        cached = CachedPrior(prior, 1, None, None, dtype, step_rows=step_rows)
        if dtype == torch.float32 and torch.backends.mkldnn.is_available():
            assert cached.layers[0].up.weight.is_mkldnn == (step_rows > 1)
        window = HostPlaces(0, codes.shape[1])
        cached.put(window, codes)
        logits.append(cached.logits(window))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
