from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from clipmill.config import TrainingConfig
from clipmill.training.zero.guard import STEPS_TO_LEARN, Guard


def guarded(spike_factor: float | None) -> tuple[nn.Parameter, torch.optim.AdamW, Guard]:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    return parameter, optimizer, Guard(optimizer, 1.0, num_ranks=1, partitioned=False, spike_factor=spike_factor)


def step(parameter: nn.Parameter, optimizer: torch.optim.AdamW, norm: float) -> bool:
    """Whether a step with gradients of this norm changes anything."""
    before = parameter.detach().clone(), {name: value.clone() for name, value in optimizer.state[parameter].items()}
    parameter.grad = torch.full((3,), norm / 3**0.5)
    optimizer.step()
    state = optimizer.state[parameter]
    return not torch.equal(parameter, before[0]) or any(
        not torch.equal(state[name], old) for name, old in before[1].items()
    )


def test_a_spike_is_skipped() -> None:
    parameter, optimizer, guard = guarded(spike_factor=3.0)
    assert step(parameter, optimizer, 1.0)
    assert step(parameter, optimizer, 10.0), "nothing is usual yet"
    for _ in range(3 * STEPS_TO_LEARN):
        assert step(parameter, optimizer, 2.0)
    usual = guard.usual.clone()
    assert 2 < usual[0] < 2.2
    for norm in (torch.inf, torch.nan):
        assert not step(parameter, optimizer, norm)
        assert guard.skipped
        assert torch.equal(guard.usual, usual), "it says nothing of what is usual"
    for norm in (7.0, 1e6):
        assert not step(parameter, optimizer, norm)
        assert guard.skipped
    assert guard.usual[0] < 1.1 * usual[0], "one spike hides the next"
    assert step(parameter, optimizer, 5.9)
    assert not guard.skipped


def test_what_has_come_to_stay_is_no_spike_for_long() -> None:
    parameter, optimizer, _ = guarded(spike_factor=3.0)
    for _ in range(3 * STEPS_TO_LEARN):
        step(parameter, optimizer, 1.0)
    skipped = [not step(parameter, optimizer, 4.0) for _ in range(20)]
    assert skipped[0]
    assert sum(skipped) < 10, "a run ends after ten in a row"
    assert not any(skipped[10:])


def test_without_a_factor_no_norm_is_too_large() -> None:
    parameter, optimizer, _ = guarded(spike_factor=None)
    for _ in range(2 * STEPS_TO_LEARN):
        step(parameter, optimizer, 1.0)
    assert step(parameter, optimizer, 1e6)


def test_what_is_usual_survives_a_checkpoint_to_the_bit() -> None:
    parameter, optimizer, guard = guarded(spike_factor=3.0)
    for number in range(7):
        step(parameter, optimizer, 1 + number / 7)
    assert torch.equal(torch.tensor(json.loads(json.dumps(guard.usual.tolist()))), guard.usual)


@pytest.mark.parametrize("settings", [{"zero_stage": 3}, {"zero_stage": 1, "offload": True}])
def test_where_deepspeed_decides_it_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="spike_factor needs zero_stage 0, 1 or 2 without offload"):
        TrainingConfig.model_validate({"spike_factor": 5.0, **settings})
