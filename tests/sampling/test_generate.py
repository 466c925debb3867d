from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.config import PriorModelConfig
from clipmill.models.prior import Prior
from clipmill.sampling.generate import draw, generate, noise

SHAPE = (2, 4, 4)


@pytest.fixture(params=[0, 3], ids=["unconditional", "classes"])
def prior(request: pytest.FixtureRequest) -> Prior:
    config = PriorModelConfig(hidden_dim=24, num_heads=2, num_layers=2, class_conditional=request.param > 0)
    prior = Prior(config, SHAPE, 13, torch.randn(13, 5), num_classes=request.param).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return prior


def labels_of(prior: Prior, indices: list[int]) -> torch.Tensor | None:
    return torch.tensor([index % 3 for index in indices]) if prior.norms.num_classes else None


def make(prior: Prior, indices: list[int], seed: int = 5) -> torch.Tensor:
    return generate(prior, seed=seed, indices=indices, labels=labels_of(prior, indices), top_p=0.95)


def test_a_sample_depends_on_its_seed_and_index_alone(prior: Prior) -> None:
    batch = make(prior, [0, 1, 2, 3])
    assert batch.shape == (4, *SHAPE)
    assert batch.dtype == torch.int64
    assert (batch.min() >= 0) & (batch.max() < 13)
    assert torch.equal(make(prior, [0, 1, 2, 3]), batch)
    assert torch.equal(make(prior, [3, 1, 7, 0])[[3, 1, 0]], batch[[0, 1, 3]])
    assert torch.equal(make(prior, [2]), batch[2:3])
    assert not torch.equal(batch[0], batch[1])
    assert not torch.equal(make(prior, [0], seed=6), batch[:1])


def test_samples_follow_the_full_pass(prior: Prior) -> None:
    """Drawing with the logits of the uncached model at each position gives the same codes."""
    codes = make(prior, [0, 1])
    with torch.no_grad():
        logits = prior(codes, labels_of(prior, [0, 1]))
    uniforms = torch.from_numpy(noise(5, [0, 1], 32))
    for position in range(32):
        drawn = draw(logits[:, position], uniforms[position], temperature=1.0, top_k=None, top_p=0.95)
        assert torch.equal(drawn, codes.flatten(1)[:, position])


def test_temperature_and_top_k_reach_the_likeliest_code(prior: Prior) -> None:
    indices = [0, 1, 2]
    greedy = generate(prior, seed=0, indices=indices, labels=labels_of(prior, indices), top_k=1)
    cold = generate(prior, seed=1, indices=indices, labels=labels_of(prior, indices), temperature=1e-4)
    assert torch.equal(greedy, cold)


def test_noise_is_keyed_by_seed_and_index() -> None:
    columns = noise(1, [4, 9], 1000)
    assert columns.shape == (1000, 2)
    assert np.array_equal(noise(1, [9], 1000)[:, 0], columns[:, 1])
    assert np.array_equal(noise(1, [9], 10)[:, 0], columns[:10, 1])
    assert not np.array_equal(noise(2, [9], 1000)[:, 0], columns[:, 1])
    assert abs(np.corrcoef(columns.T)[0, 1]) < 0.1
    assert ((columns >= 0) & (columns < 1)).all()
    # The keys are (seed, index); the values must stay: every sample on disk was made from them.
    assert (noise(7, [3], 2)[:, 0] * 2**53).tolist() == [4342628383507864, 6522433390077937]
    assert noise(2**64 - 1, [2**64 - 1], 3).shape == (3, 1)


@settings(max_examples=50)
@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draw_inverts_the_cumulative_distribution(weights: list[int], uniform: float) -> None:
    logits = torch.tensor([weights], dtype=torch.float64).log()
    code = draw(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0, top_k=None, top_p=1.0).item()
    assert weights[code] > 0
    total = sum(weights)
    assert sum(weights[:code]) / total <= uniform + 1e-12
    assert uniform <= sum(weights[: code + 1]) / total + 1e-12


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(None, 1.0, {0, 1, 2, 3}), (2, 1.0, {1, 3}), (9, 1.0, {0, 1, 2, 3}), (None, 0.5, {1, 3}), (None, 0.01, {3})],
)
def test_filters_keep_the_likeliest(top_k: int | None, top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[0.2, 0.3, 0.1, 0.4]]).log().expand(1000, -1)
    uniforms = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    drawn = draw(logits, uniforms, temperature=1.0, top_k=top_k, top_p=top_p)
    assert set(drawn.tolist()) == kept
    weights = {0: 0.2, 1: 0.3, 2: 0.1, 3: 0.4}
    total = sum(weights[code] for code in kept)
    for code in kept:
        assert (drawn == code).float().mean().item() == pytest.approx(weights[code] / total, abs=0.002)


def guided_prior() -> Prior:
    config = PriorModelConfig(
        hidden_dim=24, num_heads=2, num_layers=2, style="modern", class_conditional=True, label_dropout=0.1
    )
    prior = Prior(config, SHAPE, 13, None, num_classes=3).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return prior


def test_guidance_draws_from_the_combined_logits() -> None:
    prior, labels = guided_prior(), torch.tensor([2, 0])
    codes = generate(prior, seed=5, indices=[0, 1], labels=labels, guidance=2.5)
    with torch.no_grad():
        with_class, without = prior(codes, labels), prior(codes, torch.full((2,), prior.null_label))
    logits = without + 2.5 * (with_class - without)
    uniforms = torch.from_numpy(noise(5, [0, 1], 32))
    for position in range(32):
        drawn = draw(logits[:, position], uniforms[position], temperature=1.0, top_k=None, top_p=1.0)
        assert torch.equal(drawn, codes.flatten(1)[:, position])
    assert not torch.equal(generate(prior, seed=5, indices=[0, 1], labels=labels), codes)


def test_guidance_of_one_is_none_and_of_nought_forgets_the_class() -> None:
    prior, labels = guided_prior(), torch.tensor([2, 0])
    nearly = generate(prior, seed=5, indices=[0, 1], labels=labels, guidance=1 + 1e-9)
    assert torch.equal(nearly, generate(prior, seed=5, indices=[0, 1], labels=labels))
    blind = [generate(prior, seed=5, indices=[0, 1], labels=names, guidance=0.0) for names in (labels, labels.flip(0))]
    assert torch.equal(*blind)
    with pytest.raises(ValueError, match="label dropout"):
        generate(guided_prior(), seed=0, indices=[0], guidance=2.0)


def test_given_latents_stay_and_what_follows_is_what_would_have_followed(prior: Prior) -> None:
    """A sample whose own first frame is given comes out as it was: the same noise meets the same logits."""
    codes = make(prior, [0, 1])
    again = generate(prior, seed=5, indices=[0, 1], labels=labels_of(prior, [0, 1]), top_p=0.95, prefix=codes[:, :1])
    assert torch.equal(again, codes)
    other = (codes[:, :1] + 1) % 13
    continued = generate(prior, seed=5, indices=[0, 1], labels=labels_of(prior, [0, 1]), prefix=other)
    assert torch.equal(continued[:, :1], other)
    assert not torch.equal(continued[:, 1:], codes[:, 1:])
