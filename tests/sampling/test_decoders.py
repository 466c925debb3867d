"""Both decoders draw the same codes, and draw them from the exact distribution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from clipmill.config import PriorModelConfig
from clipmill.models.decoding import CachedPrior
from clipmill.models.places import HostPlaces
from clipmill.models.prior import Prior
from clipmill.sampling import parallel, sequential
from clipmill.sampling.drawing import Drawing
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.graphs import context_bucket
from clipmill.sampling.kept import Kept
from clipmill.sampling.noise import Noise
from tests.models import test_conditioning, test_prior

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"filters": Filters(0.8)},
    "schedule": {"filters": Filters((1.3, 0.7))},
    "top-k": {"filters": Filters(top_k=5)},
    "top-p": {"filters": Filters(top_p=0.9)},
    "min-p": {"filters": Filters(min_p=0.1)},
    "guidance": {"guidance": 2.0},
    "second-window": {"first_frame": 3},
}


def both(prior: Prior, num_samples: int = 4, **keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    indices = range(num_samples)
    labels = torch.tensor([index % 3 for index in indices]) if prior.norms.num_classes else None
    decoded = [
        generate(prior, seed=1, indices=indices, labels=labels, decoder=decoder, **keys)
        for decoder in ("sequential", "parallel")
    ]
    return decoded[0], decoded[1]


@pytest.mark.parametrize("settings", SETTINGS)
@test_prior.styles
def test_parallel_draws_what_sequential_draws(style: str, settings: str) -> None:
    prior = test_prior.stirred(3, style, label_dropout=0.1)
    first, second = both(prior, **SETTINGS[settings])
    assert torch.equal(first, second)
    given = (first[:, :1] + 1) % 11
    first, second = both(prior, prefix=given, **SETTINGS[settings])
    assert torch.equal(first, second)
    assert torch.equal(first[:, :1], given)


@test_prior.styles
def test_parallel_draws_what_sequential_draws_of_several_codebooks(style: str) -> None:
    assert torch.equal(*both(test_prior.stirred(style=style, shape=(2, 2, 2, 3))))


@test_conditioning.styles
@test_conditioning.conditions
def test_parallel_draws_what_sequential_draws_under_conditions(condition: str, style: str) -> None:
    prior = test_conditioning.stirred(condition, style, 3)
    assert torch.equal(*both(prior, 3, condition=test_conditioning.tell(condition)))


@torch.no_grad()
@test_conditioning.styles
@test_conditioning.conditions
def test_guidance_goes_away_from_the_prior_without_its_condition(condition: str, style: str) -> None:
    prior, told = test_conditioning.stirred(condition, style, condition_dropout=0.1), test_conditioning.tell(condition)
    first, second = both(prior, 3, condition=told, guidance=2.0)
    assert torch.equal(first, second)
    hidden = CachedPrior(prior, 3, None, told, torch.float32, torch.ones(3, dtype=torch.bool))
    window = HostPlaces(0, prior.num_positions)
    hidden.put(window, first.flatten(1))
    with_all, without = prior(first, None, told), hidden.logits(window)
    noise = Noise(1, range(3), 11, torch.device("cpu")).at(0, prior.num_positions)
    assert torch.equal((without + 2 * (with_all - without) + noise).argmax(-1), first.flatten(1))


@pytest.mark.parametrize("window", [1, 5, 16, 100])
def test_the_window_changes_nothing_but_the_number_of_passes(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WINDOW", {"cpu": window})
    prior = test_prior.stirred()
    first, second = both(prior)
    assert torch.equal(first, second)


def test_a_prior_that_ignores_codes_takes_one_pass_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its guesses cannot be wrong twice: the second pass finds every draw confirmed."""
    prior, passes = test_prior.stirred(), []
    with torch.no_grad():
        prior.input.project.weight.zero_()
    decode = parallel.decode_in_parallel
    monkeypatch.setattr(
        "clipmill.sampling.generate.decode_in_parallel", lambda drawing: passes.append(decode(drawing, 100))
    )
    generate(prior, seed=1, indices=range(4), decoder="parallel")
    assert passes == [2]


def test_steps_that_the_device_counts_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph holds, run without one."""

    monkeypatch.setattr("clipmill.sampling.drawing._NOISE_ELEMENTS", 5 * 4 * 11)
    for prior in (test_prior.stirred(3, label_dropout=0.1), test_prior.stirred(shape=(2, 2, 2, 3), style="modern")):
        labels = torch.tensor([0, 1, 2, 0]) if prior.norms.num_classes else None
        keys = {"seed": 1, "indices": range(4), "labels": labels, "guidance": 2.0 if labels is not None else 1.0}
        expected = generate(prior, **keys)
        with monkeypatch.context() as patch:
            patch.setattr(sequential, "device_counts", lambda device: True)
            patch.setattr(sequential.Graphs, "run", lambda graphs, key, function: function())
            kept = Kept()
            assert torch.equal(generate(prior, kept=kept, **keys), expected)
            prefix = expected[:, :1]
            assert torch.equal(generate(prior, prefix=prefix, kept=kept, **keys), expected)


@test_prior.styles
@pytest.mark.parametrize("filters", [Filters(), Filters((0.9, 0.8), 5, 0.9, 0.1)])
def test_a_step_that_the_device_counts_never_waits_for_it(style: str, filters: Filters) -> None:
    """A tensor without data has no number to wait for: asking it for one raises."""
    prior, meta = test_prior.stirred(3, style).to("meta"), torch.device("meta")
    with torch.inference_mode():
        cached = CachedPrior(prior, 4, torch.zeros(4, dtype=torch.int64, device=meta), None, torch.bfloat16)
        drawing = Drawing(prior, cached, 4, 1.0, filters)
        drawing.begin(Noise(0, range(4), 11, meta))
        step = sequential.DeviceStep(drawing)
        step.refill(0)
        step(64, 0)
        with pytest.raises(RuntimeError, match="meta"):
            step.position.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are not compared with eager steps here")
@test_prior.styles
def test_cuda_graphs_draw_what_eager_steps_draw(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = test_prior.stirred(3, style, label_dropout=0.1, shape=(4, 8, 8)).cuda()
    keys = {"seed": 1, "indices": range(4), "labels": torch.tensor([0, 1, 2, 0]), "guidance": 2.0}
    graphed = generate(prior, **keys)
    with monkeypatch.context() as patch:
        patch.setattr(sequential.Graphs, "run", lambda self, key, function: function())
        assert torch.equal(generate(prior, **keys), graphed)
    assert torch.equal(generate(prior, decoder="parallel", **keys), graphed)
    assert torch.equal(generate(prior.cpu(), **keys), graphed.cpu())


def test_a_bucket_holds_its_context_and_fits_the_cache() -> None:
    for num_positions in (1, 64, 100, 900, 1024, 4096):
        buckets = [context_bucket(context, num_positions) for context in range(1, num_positions + 1)]
        assert all(bucket >= context for context, bucket in enumerate(buckets, 1))
        assert max(buckets) < num_positions + 64
        assert len(set(buckets)) <= 8
        assert all(bucket % 64 == 0 for bucket in buckets)


# ------------------------------------------------------------------------------------------ exact distributions

TOY = (1, 1, 3)
TOY_CODES = 4
NUM_DRAWS = 20_000


def toy_prior() -> Prior:
    torch.manual_seed(3)
    config = PriorModelConfig(hidden_dim=24, num_heads=2, num_layers=1, class_conditional=True, label_dropout=0.1)
    prior = Prior(config, TOY, TOY_CODES, torch.randn(TOY_CODES, 5), num_classes=1).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return prior


def filtered(logits: np.ndarray, filters: Filters) -> np.ndarray:
    """Probabilities of one position, code by code, as the filters' descriptions say."""
    assert isinstance(filters.temperature, float)
    weights = np.exp(logits / filters.temperature)
    probabilities = weights / weights.sum()
    if filters.top_k is not None:
        probabilities[probabilities < np.sort(probabilities)[-filters.top_k]] = 0
        probabilities /= probabilities.sum()
    kept: list[int] = []
    for code in np.argsort(-probabilities):
        if probabilities[kept].sum() < filters.top_p and probabilities[code] >= filters.min_p * probabilities.max():
            kept.append(int(code))
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result / result.sum()


@torch.no_grad()
def exact_distribution(prior: Prior, filters: Filters, guidance: float) -> np.ndarray:
    """Probability of each of the 64 sequences."""
    sequences = torch.tensor(list(itertools.product(range(TOY_CODES), repeat=3)))
    codes = sequences.view(-1, *TOY)
    with_class, without = (prior(codes, torch.full((64,), label)).double().numpy() for label in (0, prior.null_label))
    logits = without + guidance * (with_class - without)
    return np.array(
        [
            math.prod(filtered(row[place], filters)[code] for place, code in enumerate(sequence))
            for row, sequence in zip(logits, sequences.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("decoder", ["sequential", "parallel"])
@pytest.mark.parametrize(
    ("filters", "guidance"),
    [
        (Filters(), 1.0),
        (Filters(0.7), 1.0),
        (Filters(1.5), 1.0),
        (Filters(top_k=2), 1.0),
        (Filters(top_p=0.7), 1.0),
        (Filters(min_p=0.4), 1.0),
        (Filters(0.8, 3, 0.9, 0.1), 1.0),
        (Filters(), 2.0),
    ],
    ids=["plain", "cold", "hot", "top-k", "top-p", "min-p", "all", "guidance"],
)
def test_samples_have_the_exact_distribution(filters: Filters, guidance: float, decoder: Any) -> None:
    prior = toy_prior()
    expected = exact_distribution(prior, filters, guidance) * NUM_DRAWS
    labels = torch.zeros(NUM_DRAWS, dtype=torch.int64)
    codes = generate(
        prior, seed=9, indices=range(NUM_DRAWS), labels=labels, guidance=guidance, filters=filters, decoder=decoder
    )
    numbers = codes.flatten(1) @ torch.tensor([16, 4, 1])
    counts = torch.bincount(numbers, minlength=64).numpy()
    assert not counts[expected == 0].any()
    possible = expected > 0
    # Sequences expected less than 5 times count as one.
    rare = possible & (expected < 5)
    observed = np.append(counts[possible & ~rare], counts[rare].sum())
    wanted = np.append(expected[possible & ~rare], max(expected[rare].sum(), 1e-9))
    if not rare.any():
        observed, wanted = observed[:-1], wanted[:-1]
    degrees = len(observed) - 1
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty: the cube root of chi-square over its degrees is about normal. Beyond 3.1 once in 1,000.
    spread = 2 / (9 * degrees)
    assert ((chi_square / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 3.1
