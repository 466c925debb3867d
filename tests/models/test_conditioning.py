from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from clipmill.config import PriorModelConfig
from clipmill.errors import UserError
from clipmill.models.conditioning import condition_of, per_latent_frame
from clipmill.models.prior import Prior
from clipmill.models.resnet import FrameEncoder

SHAPE = (2, 2, 3)
CONDITIONS: dict[str, dict[str, Any]] = {
    "frames": {"condition": "frames"},
    "actions-attended": {"condition": "actions"},
    "actions-norm": {"condition": "actions", "condition_by": "norm"},
    "actions-add": {"condition": "actions", "condition_by": "add"},
    "text": {"condition": "text"},
}
conditions = pytest.mark.parametrize("condition", CONDITIONS)
styles = pytest.mark.parametrize("style", ["videogpt", "modern"])


def tell(condition: str, batch_size: int = 3) -> torch.Tensor:
    if condition == "frames":
        return torch.randint(256, (batch_size, 1, 8, 12, 3), dtype=torch.uint8)
    return torch.randn(batch_size, *((4, 2) if condition.startswith("actions") else (5, 7)))


def build(condition: str, style: str = "videogpt", num_classes: int = 0, **keys: Any) -> Prior:
    config = PriorModelConfig(
        hidden_dim=24,
        num_heads=2,
        num_layers=2,
        style=style,
        class_conditional=num_classes > 0,
        **{"dropout": 0.0, "attention_dropout": 0.0, **CONDITIONS[condition], **keys},
    )
    shape = tuple(tell(condition, 1).shape[1:])
    return Prior(config, SHAPE, 11, torch.randn(11, 5), num_classes, condition_shape=shape)


def stirred(*arguments: Any, **keys: Any) -> Prior:
    """Every parameter away from its start, so that nothing is hidden behind a zero."""
    prior = build(*arguments, **keys).eval()
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if not name.startswith("condition.encoder"):  # 34 layers of noise overflow
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return prior


def some_codes(batch_size: int = 3) -> torch.Tensor:
    return torch.randint(11, (batch_size, *SHAPE))


@styles
@conditions
def test_gradients_reach_every_parameter_with_a_class_too(condition: str, style: str) -> None:
    prior = stirred(condition, style, num_classes=3).train()
    prior.loss(some_codes(), torch.arange(3), tell(condition)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in prior.parameters())


@torch.no_grad()
@conditions
def test_each_clip_is_told_its_own_condition(condition: str) -> None:
    prior, codes, told = stirred(condition, num_classes=2), some_codes(), tell(condition)
    label = torch.zeros(3, dtype=torch.int64)
    before = prior(codes, label, told)
    changed = told.clone()
    changed[1] = tell(condition, 1)[0]
    difference = (prior(codes, label, changed) - before).abs().amax((1, 2))
    assert difference[1] > 1e-3
    assert difference[[0, 2]].max() < 1e-5
    assert (prior(codes, label + 1, told) - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("condition", ["actions-norm", "actions-add"])
def test_an_action_acts_in_its_latent_frame_only_and_at_the_start_not_at_all(condition: str) -> None:
    prior, told = stirred(condition), tell(condition)
    other = told.clone()
    other[:, 2:] += 1  # frames of the second latent
    codes = some_codes()
    difference = (prior(codes, None, other) - prior(codes, None, told)).abs().amax((0, 2))
    assert not difference[:6].any()
    assert difference[6:].all()
    fresh = build(condition).eval()
    torch.nn.init.normal_(fresh.head.weight)
    assert torch.equal(fresh(codes, None, other), fresh(codes, None, told))


def test_actions_of_a_latent_frame_stand_side_by_side() -> None:
    actions = torch.arange(10.0).view(1, 5, 2)
    assert per_latent_frame(actions[:, :4], 2)[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert per_latent_frame(actions, 3)[0].tolist() == [[0, 1, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_frames_come_at_a_quarter_of_their_size_through_34_layers() -> None:
    encoder = FrameEncoder(240)
    assert encoder(torch.randn(1, 3, 2, 10, 16)).shape == (1, 2, 3, 4, 240)
    kernels = [module.kernel_size[0] for module in encoder.modules() if isinstance(module, torch.nn.Conv3d)]
    assert kernels.count(3) + 1 == 34  # the classifier is not there


def test_hidden_labels_are_those_of_the_null_class() -> None:
    prior = build("actions-add", num_classes=3, label_dropout=0.5)
    torch.nn.init.normal_(prior.norms.table)
    torch.nn.init.normal_(prior.head.weight)
    codes, told = some_codes(64), tell("actions-add", 64)
    label = torch.zeros(64, dtype=torch.int64)
    known, hidden = prior.eval().loss(codes, label, told), prior.loss(codes, label + prior.null_label, told)
    mixed = prior.train().loss(codes, label, told)
    is_hidden = torch.isclose(mixed, hidden)
    torch.testing.assert_close(mixed[~is_hidden], known[~is_hidden])
    assert 16 < is_hidden.sum() < 48


@conditions
@styles
def test_a_hidden_condition_is_the_same_whatever_it_was_and_is_learned(condition: str, style: str) -> None:
    prior, codes = stirred(condition, style, condition_dropout=0.5), some_codes(3)
    told, other = tell(condition), tell(condition)
    hide = torch.tensor([True, False, True])
    with torch.no_grad():
        first, second = prior.conditioning(told, hide), prior.conditioning(other, hide)
    for one, two in zip(first, second, strict=True):
        if one is not None and two is not None:
            assert torch.equal(one[hide], two[hide])
            assert not torch.isclose(one[~hide], two[~hide]).all()
    prior.train().loss(codes.repeat(8, 1, 1, 1), None, told.repeat(8, *[1] * (told.dim() - 1))).sum().backward()
    gradient = prior.get_parameter("condition.null").grad
    assert gradient is not None
    assert gradient.any()


@torch.no_grad()
def test_class_and_condition_are_hidden_together(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = stirred("actions-add", num_classes=3, label_dropout=0.5, condition_dropout=0.5)
    codes, told, label = some_codes(64), tell("actions-add", 64), torch.zeros(64, dtype=torch.int64)
    known = prior.loss(codes, label, told)
    mixed = prior.train().loss(codes, label, told)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", torch.zeros)  # below any share
        neither = prior.loss(codes, label, told)
        assert torch.equal(prior.loss(codes, label + 1, tell("actions-add", 64)), neither)
    is_hidden = torch.isclose(mixed, neither)
    torch.testing.assert_close(mixed[~is_hidden], known[~is_hidden])
    assert 16 < is_hidden.sum() < 48


def test_a_prior_that_never_hid_its_condition_knows_no_hidden_one() -> None:
    with pytest.raises(ValueError, match="cannot hide its condition"):
        build("text").conditioning(tell("text"), torch.ones(3, dtype=torch.bool))


def test_conditions_that_are_missing_or_of_another_shape_are_refused() -> None:
    prior = build("text")
    with pytest.raises(ValueError, match="got no condition"):
        prior.loss(some_codes())
    with pytest.raises(ValueError, match=r"shape \(4, 7\) for a prior that takes \(5, 7\)"):
        prior.loss(some_codes(), None, torch.randn(3, 4, 7))
    with pytest.raises(UserError, match=r"text, which not all clips have"):
        condition_of({"codes": 1}, prior.config)
    with pytest.raises(UserError, match="needs clips with text"):
        Prior(prior.config, SHAPE, 11, torch.randn(11, 5))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"condition": ["frames", "text"]}, "Input should be 'frames', 'actions' or 'text'"),
        ({"condition": "text", "condition_by": "add"}, "condition_by=add needs condition=actions"),
        ({"condition_by": "norm"}, "condition_by=norm needs condition=actions"),
        ({"label_dropout": 0.1}, "label_dropout needs class_conditional=true"),
        ({"condition_dropout": 0.1}, "condition_dropout needs condition, or there is nothing to hide"),
    ],
)
def test_only_what_is_supported_can_be_asked_for(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PriorModelConfig(**keys)
