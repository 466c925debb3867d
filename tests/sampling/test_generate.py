from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from clipmill.config import PriorModelConfig
from clipmill.errors import UserError
from clipmill.models.prior import Prior
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.noise import Noise

SHAPE = (2, 4, 4)
K = 13


def stirred(shape: tuple[int, ...] = SHAPE, num_classes: int = 0, **keys: Any) -> Prior:
    config = PriorModelConfig(hidden_dim=24, num_heads=2, num_layers=2, class_conditional=num_classes > 0, **keys)
    prior = Prior(config, shape, K, torch.randn(K, 5), num_classes=num_classes).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return prior


@pytest.fixture(params=[0, 3], ids=["unconditional", "classes"])
def prior(request: pytest.FixtureRequest) -> Prior:
    return stirred(num_classes=request.param)


@pytest.fixture(params=["sequential", "parallel"], autouse=True)
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that holds of one decoder holds of the other."""
    monkeypatch.setattr(f"{__name__}.generate", functools.partial(generate, decoder=request.param))


def labels_of(prior: Prior, indices: list[int]) -> torch.Tensor | None:
    return torch.tensor([index % 3 for index in indices]) if prior.norms.num_classes else None


def make(prior: Prior, indices: list[int], seed: int = 5, **keys: Any) -> torch.Tensor:
    labels = labels_of(prior, indices)
    return generate(prior, seed=seed, indices=indices, labels=labels, **{"filters": Filters(top_p=0.95), **keys})


def assert_drawn_from(logits: torch.Tensor, codes: torch.Tensor, indices: list[int], first: int = 0) -> None:
    """Whether each code has the greatest sum of logit [B, L, K] and noise of seed 5."""
    noise = Noise(5, indices, K, torch.device("cpu")).at(first, logits.shape[1])
    assert torch.equal((logits + noise).argmax(-1), codes.flatten(1))


def test_a_sample_depends_on_its_seed_and_index_alone(prior: Prior) -> None:
    batch = make(prior, [0, 1, 2, 3])
    assert batch.shape == (4, *SHAPE)
    assert batch.dtype == torch.int64
    assert (batch.min() >= 0) & (batch.max() < K)
    assert torch.equal(make(prior, [0, 1, 2, 3]), batch)
    assert torch.equal(make(prior, [3, 1, 7, 0])[[3, 1, 0]], batch[[0, 1, 3]])
    assert torch.equal(make(prior, [2]), batch[2:3])
    assert not torch.equal(batch[0], batch[1])
    assert not torch.equal(make(prior, [0], seed=6), batch[:1])


@torch.no_grad()
def test_samples_follow_the_full_pass(prior: Prior) -> None:
    """Drawing with the logits of the uncached model at each position gives the same codes."""
    codes = make(prior, [0, 1], filters=Filters())
    assert_drawn_from(prior(codes, labels_of(prior, [0, 1])), codes, [0, 1])


def test_temperature_and_top_k_reach_the_likeliest_code(prior: Prior) -> None:
    greedy = make(prior, [0, 1, 2], filters=Filters(top_k=1))
    assert torch.equal(greedy, make(prior, [0, 1, 2], seed=1, filters=Filters(1e-4)))


@torch.no_grad()
def test_a_window_has_the_noise_and_the_temperatures_of_its_place(prior: Prior) -> None:
    schedule = (1.0, 0.5, 2.0, 0.25)
    codes = make(prior, [0, 1], first_frame=2, filters=Filters(schedule))
    logits = prior(codes, labels_of(prior, [0, 1])) / torch.tensor(schedule[2:]).repeat_interleave(16)[:, None]
    assert_drawn_from(logits, codes, [0, 1], first=32)


@torch.no_grad()
def test_guidance_draws_from_the_combined_logits() -> None:
    prior, labels = stirred(num_classes=3, style="modern", label_dropout=0.1), torch.tensor([2, 0])
    codes = generate(prior, seed=5, indices=[0, 1], labels=labels, guidance=2.5)
    with_class, without = prior(codes, labels), prior(codes, torch.full((2,), prior.null_label))
    assert_drawn_from(without + 2.5 * (with_class - without), codes, [0, 1])
    assert not torch.equal(generate(prior, seed=5, indices=[0, 1], labels=labels), codes)


def test_guidance_of_one_is_none_and_of_nought_forgets_the_class() -> None:
    prior, labels = stirred(num_classes=3, style="modern", label_dropout=0.1), torch.tensor([2, 0])
    nearly = generate(prior, seed=5, indices=[0, 1], labels=labels, guidance=1 + 1e-9)
    assert torch.equal(nearly, generate(prior, seed=5, indices=[0, 1], labels=labels))
    blind = [generate(prior, seed=5, indices=[0, 1], labels=names, guidance=0.0) for names in (labels, labels.flip(0))]
    assert torch.equal(*blind)
    with pytest.raises(ValueError, match="label_dropout"):
        generate(stirred(), seed=0, indices=[0], guidance=2.0)


def test_given_latents_stay_and_what_follows_is_what_would_have_followed(prior: Prior) -> None:
    """A sample whose own first frame is given comes out as it was: the same noise meets the same logits."""
    codes = make(prior, [0, 1])
    assert torch.equal(make(prior, [0, 1], prefix=codes[:, :1]), codes)
    other = (codes[:, :1] + 1) % K
    continued = make(prior, [0, 1], prefix=other)
    assert torch.equal(continued[:, :1], other)
    assert not torch.equal(continued[:, 1:], codes[:, 1:])


@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=3), Filters(top_p=0.9), Filters(min_p=0.1)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_logits_that_are_not_finite_name_the_sample(filters: Filters, value: float) -> None:
    prior = stirred(num_classes=3)
    with torch.no_grad():
        prior.norms.table[1, -1, 1] = value  # class 1 is that of sample 7
    with pytest.raises(UserError, match="sample 7: the logits of the prior are not finite"):
        make(prior, [3, 7, 9], filters=filters)
    assert make(prior, [3, 9], filters=filters).shape == (2, *SHAPE)


def test_logits_that_a_temperature_or_guidance_overflows_name_the_sample() -> None:
    prior = stirred(num_classes=3, label_dropout=0.1)
    for keys in ({"filters": Filters(1e-40)}, {"guidance": 1e39}):
        with pytest.raises(UserError, match="sample 4: the logits of the prior are not finite"):
            make(prior, [4], **keys)
