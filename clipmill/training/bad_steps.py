"""Finds and reports bad steps when metrics are fetched, so that no step waits for the device.

A step is bad if the norm of its gradients, which is equal on all ranks, is not finite or a spike. No rank applies such
a step (see ``zero/guard.py``). The clips that caused it are identified later, when the metrics are fetched.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clipmill.errors import StageFailed
from clipmill.training import checkpoint
from clipmill.training.world import World

__all__ = ["Ledger"]

MOST_SKIPPED_IN_A_ROW = 10
MOST_KEYS = 8
"""Maximum number of clips that an error names."""


class _Step(NamedTuple):
    number: int
    keys: list[str]
    loss: Tensor
    norm: Tensor
    skipped: Tensor


class Ledger:
    """Collects steps until the next look, and acts on the bad ones among them.

    Args:
        world: this rank and its peers.
        policy: ``stop`` or ``skip``, see ``TrainingConfig.bad_steps``.
        folder_url: the training folder, for its checkpoints.
        num_skipped: steps skipped before.

    Attributes:
        num_skipped: all steps skipped so far.
        num_in_a_row: number of steps that were skipped since the last applied one.
    """

    def __init__(self, world: World, policy: str, folder_url: str, num_skipped: int) -> None:
        self._world, self._policy, self._folder_url = world, policy, folder_url
        self._steps: list[_Step] = []
        self.num_in_a_row = 0
        self.num_skipped = num_skipped

    def add(self, number: int, keys: list[str], loss: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Notes a step without waiting for its values.

        Args:
            number: steps done, including this one.
            keys: keys of this rank's clips.
            loss: sum over this rank's clips, 0-d on the device.
            norm: gradient norm over all ranks, 0-d on the device.
            skipped: whether all ranks skipped the step, bool 0-d on the device.
        """
        self._steps.append(_Step(number, keys, loss, norm, skipped))

    def look(self) -> None:
        """Looks at the steps since the last call. Collective; waits for the device.

        Raises:
            StageFailed: a step was bad and the policy is ``stop``, or too many steps in a row were bad.
        """
        steps, self._steps = self._steps, []
        numbers = torch.stack([torch.stack([part.float() for part in step[2:]]) for step in steps]).tolist()
        if self._policy == "stop":
            any_bad = self._world.sum([not math.isfinite(loss) or skipped for loss, _, skipped in numbers])
            first = next((index for index, bad in enumerate(any_bad) if bad), None)
            if first is not None:
                self._stop(steps[first], *numbers[first][:2])
            return
        for step, (_, norm, skipped) in zip(steps, numbers, strict=True):
            self.num_in_a_row = self.num_in_a_row + 1 if skipped else 0
            self.num_skipped += bool(skipped)
            if self.num_in_a_row >= MOST_SKIPPED_IN_A_ROW:
                raise StageFailed(
                    f"{self.num_in_a_row} steps in a row up to step {step.number} were skipped, the last for grad_norm "
                    f"{norm:g}; {self.last_good()}; lower the learning rate{_or_factor(norm)} and run again"
                )

    def _stop(self, step: _Step, loss: float, norm: float) -> None:
        """Raises on all ranks the error of the first rank whose loss was bad; of rank 0 if only gradients were bad."""
        own = not math.isfinite(loss)
        clips = ", ".join(step.keys[:MOST_KEYS])
        if len(step.keys) > MOST_KEYS:
            clips += f" and {len(step.keys) - MOST_KEYS} more"
        what = f"loss {loss} on rank {self._world.rank} (clips {clips})" if own else f"grad_norm {norm:g}"
        error = StageFailed(
            f"step {step.number} gave {what}; {self.last_good()}; lower the learning rate{_or_factor(norm)}, or "
            "skip such steps with bad_steps=skip, and run again"
        )
        self._world.raise_first(error if own else None)
        self._world.raise_first(error)

    def last_good(self) -> str:
        """Says, for a message, which checkpoint a user can go back to."""
        saved = checkpoint.newest(self._folder_url)
        return f"the last good checkpoint is {saved.url}" if saved else "no checkpoint was written before"


def _or_factor(norm: float) -> str:
    """Further advice against a step that was skipped because of this gradient norm."""
    return ", or raise spike_factor," if math.isfinite(norm) else ""
