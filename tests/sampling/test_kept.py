"""What a drawing keeps between batches leaves no trace in the codes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from clipmill.errors import UserError
from clipmill.models.decoding import CachedPrior
from clipmill.sampling import sequential
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.kept import Kept
from tests.models import test_conditioning, test_prior


@pytest.fixture
def num_prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of each prior that is made ready."""
    rows: list[int] = []
    prepare = CachedPrior.__init__

    def note(cached: CachedPrior, prior: Any, num_rows: int, *rest: Any) -> None:
        rows.append(num_rows)
        prepare(cached, prior, num_rows, *rest)

    monkeypatch.setattr(CachedPrior, "__init__", note)
    return rows


@pytest.fixture(params=["host", "device"])
def _counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the steps that CUDA graphs hold, run without them."""
    if request.param == "device":
        monkeypatch.setattr(sequential, "device_counts", lambda device: True)
        monkeypatch.setattr(sequential.Graphs, "run", lambda graphs, key, function: function())


@pytest.mark.usefixtures("_counting")
@test_prior.styles
@pytest.mark.parametrize("decoder", ["sequential", "parallel"])
def test_batches_of_one_size_share_a_drawing(style: str, decoder: Any, num_prepared: list[int]) -> None:
    prior, kept = test_prior.stirred(3, style, label_dropout=0.1), Kept()
    keys = {"decoder": decoder, "guidance": 2.0, "filters": Filters((1.2, 0.8), top_k=5)}
    calls = [
        {"seed": 1, "indices": range(3), "labels": torch.tensor([0, 1, 2])},
        {"seed": 2, "indices": range(7, 10), "labels": torch.tensor([2, 2, 0]), "first_frame": 1},
    ]
    prefix = generate(prior, **keys, **calls[0])[:, :1]
    calls.append({"seed": 1, "indices": range(3), "labels": torch.tensor([1, 1, 1]), "prefix": prefix})
    expected = [generate(prior, **keys, **call) for call in calls]
    num_prepared.clear()
    made = [generate(prior, kept=kept, **keys, **call) for call in calls]  # codes are the caller's own
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert num_prepared == [6]


@pytest.mark.usefixtures("_counting")
@test_conditioning.styles
@test_conditioning.conditions
def test_conditions_change_between_batches(condition: str, style: str) -> None:
    prior, told, kept = test_conditioning.stirred(condition, style), test_conditioning.tell(condition), Kept()
    for each in (told, told.flip(0)):
        codes = generate(prior, seed=1, indices=range(3), condition=each, kept=kept)
        assert torch.equal(codes, generate(prior, seed=1, indices=range(3), condition=each))


def test_other_sizes_settings_and_weights_prepare_anew(num_prepared: list[int]) -> None:
    prior, kept = test_prior.stirred(), Kept()
    generate(prior, seed=1, indices=[0], kept=kept)
    for keys in ({"indices": [0, 1]}, {"indices": [0, 1], "filters": Filters(0.9)}, {"indices": [0, 1]}):
        assert torch.equal(generate(prior, seed=1, kept=kept, **keys), generate(prior, seed=1, **keys))
    with torch.no_grad():
        prior.head.weight.mul_(-1)
    assert torch.equal(generate(prior, seed=1, indices=[0, 1], kept=kept), generate(prior, seed=1, indices=[0, 1]))
    assert num_prepared == [1, 2, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.usefixtures("_counting")
def test_a_batch_that_was_not_finite_leaves_no_trace() -> None:
    prior, kept = test_prior.stirred(3, label_dropout=0.1), Kept()
    keys = {"seed": 1, "indices": range(2), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        prior.norms.table[2] = torch.nan
    with pytest.raises(UserError, match="sample 1: the logits"):
        generate(prior, kept=kept, **{**keys, "labels": torch.tensor([0, 2])})
    assert torch.equal(generate(prior, kept=kept, **keys), generate(prior, **keys))


def test_threads_draw_beside_each_other() -> None:
    prior, kept = test_prior.stirred(), Kept()
    expected = [generate(prior, seed=seed, indices=[0, 1]) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda seed: generate(prior, seed=seed, indices=[0, 1], kept=kept), range(8)))
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
