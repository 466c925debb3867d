"""Which parameters weight decay applies to: matrices and kernels, not norms, biases, gains and positions.

Weight decay pulls a parameter towards zero. For a gain or a position, that does not make the model simpler, and one
that gets no gradients for a while would vanish.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from clipmill.models.norms import Norms

__all__ = ["group_names", "parameter_groups"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: those that decay, then those that do not.

    Args:
        module: the module that is trained.
        weight_decay: of the optimizer. 0 makes a single group, because ZeRO costs host time for each group.
    """
    parameters = dict(module.named_parameters())
    constant = _constant_names(module) if weight_decay else set()
    groups = [
        {"params": [value for name, value in parameters.items() if name not in constant], "weight_decay": weight_decay},
        {"params": [value for name, value in parameters.items() if name in constant], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def group_names(module: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    """Names of the parameters of each group, in its order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def _constant_names(module: nn.Module) -> set[str]:
    """Names of the parameters that do not decay."""
    constant = {name for name, value in module.named_parameters() if value.dim() < 2 or name.endswith("gain")}
    for prefix, part in module.named_modules():
        if isinstance(part, Norms | nn.ParameterList):  # the tables of axial positions are the only lists
            constant |= {f"{prefix}.{name}" for name, _ in part.named_parameters()}
    return constant
