from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clipmill.config import PriorModelConfig
from clipmill.errors import UserError
from clipmill.models import prior as prior_module
from clipmill.models.prior import Prior

SHAPE = (2, 3, 4)
NUM_POSITIONS = math.prod(SHAPE)
shapes = pytest.mark.parametrize("shape", [SHAPE, (2, 2, 2, 3)], ids=["one-codebook", "three-codebooks"])

STYLES: dict[str, dict[str, Any]] = {
    "videogpt": {},
    "modern": {"style": "modern"},
    "modern-grouped": {"style": "modern", "num_kv_heads": 2},
}
styles = pytest.mark.parametrize("style", STYLES)


def tiny(
    num_classes: int = 0, dropout: float = 0.0, style: str = "videogpt", shape: tuple[int, ...] = SHAPE, **keys: Any
) -> Prior:
    config = PriorModelConfig(
        hidden_dim=24,
        num_heads=4,
        num_layers=2,
        dropout=dropout,
        attention_dropout=dropout,
        class_conditional=num_classes > 0,
        **STYLES[style],
        **keys,
    )
    num_rows = 11 * math.prod(shape[3:])
    return Prior(config, shape, num_codes=11, codebook=torch.randn(num_rows, 5), num_classes=num_classes)


def stirred(num_classes: int = 0, style: str = "videogpt", **keys: Any) -> Prior:
    """Every parameter away from its start, so that nothing is hidden behind a zero."""
    prior = tiny(num_classes, style=style, **keys).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return prior


def some_codes(batch_size: int = 3, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randint(11, (batch_size, *shape))


def test_loss_at_the_start_is_that_of_a_uniform_guess() -> None:
    loss = tiny().loss(some_codes())
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, torch.full((3,), math.log(11)))


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    prior, codes = stirred(), some_codes()
    expected = -prior(codes).log_softmax(-1).gather(-1, codes.flatten(1)[..., None]).squeeze(-1).mean(1)
    torch.testing.assert_close(prior.loss(codes), expected)


@shapes
def test_chunked_loss_is_the_loss(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    prior, codes = stirred(shape=shape), some_codes(shape=shape)
    whole = prior.loss(codes)
    whole_gradients = torch.autograd.grad(whole.sum(), list(prior.parameters()))
    monkeypatch.setattr(prior_module, "CHUNK_LOGITS", 11 * 7)
    chunked = prior.loss(codes)
    torch.testing.assert_close(chunked, whole)
    for gradient, expected in zip(
        torch.autograd.grad(chunked.sum(), list(prior.parameters())), whole_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, expected)


@torch.no_grad()
@styles
@shapes
def test_a_position_sees_only_the_codes_before_it(style: str, shape: tuple[int, ...]) -> None:
    prior, codes = stirred(style=style, shape=shape), some_codes(shape=shape)
    logits = prior(codes)
    for position in (0, 5, NUM_POSITIONS - 1):
        changed = codes.flatten(1).clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        difference = (prior(changed.view_as(codes)) - logits).abs().amax((0, 2))
        assert not difference[: position + 1].any()
        assert difference[position + 1 :].all()


@torch.no_grad()
@styles
def test_each_codebook_has_embeddings_and_logits_of_its_own(style: str) -> None:
    """The same code of another codebook is another code: changing one's rows leaves the others' alone."""
    shape = (1, 1, 1, 3)
    prior, codes = stirred(style=style, shape=shape), torch.full((1, *shape), 4)
    before = prior(codes)
    prior.head.weight[11 * 1 + 4] += 1
    changed = prior(codes) != before
    assert changed[0, 1, 4]
    assert changed.sum() == 1
    before = prior(codes)
    table = prior.input.embedding if style.startswith("modern") else prior.input.codebook
    table[11 * 1 + 4] += 1
    assert (prior(codes) != before)[0].any(1).tolist() == [False, False, True]


@styles
@pytest.mark.parametrize("num_classes", [0, 3])
def test_gradients_reach_every_parameter(num_classes: int, style: str) -> None:
    prior = stirred(num_classes, style).train()
    label = torch.arange(3) if num_classes else None
    prior.loss(some_codes(), label).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in prior.parameters())


@torch.no_grad()
def test_each_class_has_norms_of_its_own() -> None:
    prior = stirred(num_classes=3)
    codes = some_codes(1).expand(3, -1, -1, -1)
    label = torch.arange(3)
    before = prior(codes, label)
    assert not torch.allclose(before[0], before[1])
    prior.norms.table[1] += 1
    changed = (prior(codes, label) - before).abs().amax((1, 2))
    assert changed[1] > 0
    assert not changed[[0, 2]].any()


@torch.no_grad()
def test_a_class_norm_is_gain_one_plus_row_and_bias_row() -> None:
    prior = stirred(num_classes=2)
    norms = prior.norms(torch.tensor([1]))
    assert len(norms) == 5
    torch.testing.assert_close(norms[3].gain[0], 1 + prior.norms.table[1, 3, 0])
    torch.testing.assert_close(norms[3].bias[0], prior.norms.table[1, 3, 1])


def test_labels_and_classes_must_agree() -> None:
    with pytest.raises(ValueError, match="got no label"):
        tiny(num_classes=2).loss(some_codes())
    with pytest.raises(ValueError, match="got a label"):
        tiny().loss(some_codes(), torch.zeros(3, dtype=torch.int64))


def test_dropout_acts_in_training_only() -> None:
    prior = stirred()
    noisy = tiny(dropout=0.5)
    noisy.load_state_dict(prior.state_dict())
    codes = some_codes()
    assert not torch.equal(noisy.loss(codes), noisy.loss(codes))
    torch.testing.assert_close(noisy.eval().loss(codes), prior.loss(codes))


@torch.no_grad()
@styles
def test_bfloat16_stays_near_float32(style: str) -> None:
    prior, codes = stirred(style=style), some_codes()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = prior.loss(codes)
    torch.testing.assert_close(coarse, prior.loss(codes), rtol=0.03, atol=0)


def test_settings_that_do_not_fit_are_user_errors() -> None:
    with pytest.raises(UserError, match="needs labelled clips"):
        Prior(PriorModelConfig(hidden_dim=24, class_conditional=True), SHAPE, 11, torch.randn(11, 5), num_classes=0)


@pytest.mark.parametrize(("style", "widest"), [("videogpt", 4), ("modern", 2 * 64 / 24)])
def test_no_mask_is_stored(style: str, widest: float) -> None:
    largest = max(tensor.numel() for tensor in tiny(style=style).state_dict().values())
    assert largest == widest * 24 * 24


@styles
def test_activation_checkpoints_change_nothing(style: str) -> None:
    codes = some_codes()
    gradients = []
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(1)
        prior = tiny(dropout=0.3, style=style, checkpointed_share=share)
        torch.nn.init.normal_(prior.head.weight)
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(prior.loss(codes).sum(), list(prior.parameters())))
    for one, half, all_ in zip(*gradients, strict=True):
        assert torch.equal(one, half)
        assert torch.equal(one, all_)


@torch.no_grad()
def test_one_kv_head_for_each_head_is_plain_attention() -> None:
    grouped, plain = stirred(style="modern-grouped"), tiny(style="modern").eval()
    state = grouped.state_dict()
    for index in range(2):
        name = f"blocks.{index}.attention.qkv.weight"
        q, k, v = state[name].split((24, 12, 12))
        repeated = [part.view(2, 6, 24).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v)]
        state[name] = torch.cat([q, *repeated])
    plain.load_state_dict(state)
    codes = some_codes()
    torch.testing.assert_close(plain(codes), grouped(codes), rtol=0, atol=1e-5)


@styles
def test_it_learns(style: str) -> None:
    prior = tiny(style=style)
    codes = torch.arange(NUM_POSITIONS).remainder(11).view(1, *SHAPE).repeat(2, 1, 1, 1)
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    for _ in range(30):
        loss = prior.loss(codes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
