"""Reads a checkpoint of any world size and ZeRO stage as whole tensors, and loads these into an engine of any other.

DeepSpeed's own way (``ds_to_universal``, then ``load_universal``) stays within one ZeRO stage and leaves buffers
behind, among them the tokenizer's codebook; it also writes every tensor to the disk twice. Here the files of all ranks
are mapped into memory, and a whole tensor is assembled when it is needed. Both sides use private state of DeepSpeed. If
that changes, tests/training/test_resume.py fails: it converts between stages (ZeRO 1 to 3 in the default set, all
others in the slow set).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipmill.training.zero.partitions import masters, optimizer_states, refresh_weights

__all__ = ["GROUPS", "WholeTensors", "load_whole"]

GROUPS = "parameter_groups"
"""Key in a checkpoint: names of the parameters in each group of the optimizer. If absent, there is one group."""


class _Piece(NamedTuple):
    """A flat piece of a parameter in a file of one rank."""

    parts: Mapping[str, Tensor]
    start: int
    numel: int


class WholeTensors:
    """The tensors of a checkpoint, assembled from the files of all ranks.

    Args:
        saved: folder of the files that `Engine.save` wrote under its tag, of all ranks.
        zero_stage: of the run that saved them.

    Attributes:
        shapes: shape of each parameter, by name.
        buffers: the module's persistent buffers, by name.
        moments: states of each parameter besides its weights: ``exp_avg``, ``exp_avg_sq``, perhaps ``average``.
        num_steps: optimizer steps done, float32, 0-d.
    """

    def __init__(self, saved: Path, zero_stage: int) -> None:
        model = _load(_by_rank(saved, "model_states")[0])  # shapes and buffers are the same on every rank
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, torch.Size]
        if zero_stage == 0:
            buffers = set(model["buffer_names"])
            self.shapes = {name: tensor.shape for name, tensor in model["module"].items() if name not in buffers}
            states = self._add_plain(model)
        else:
            self.shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
            add = self._add_zero3 if zero_stage == 3 else self._add_zero12
            files = [_load(path)["optimizer_state_dict"] for path in _by_rank(saved, "optim_states")]
            states, *_ = [add(document, model["param_shapes"], len(files)) for document in files]
        self.buffers = {name: tensor for name, tensor in model["module"].items() if name not in self.shapes}
        self.moments = tuple(name for name in states[0] if name != "step")
        self.num_steps = torch.as_tensor(states[0]["step"], dtype=torch.float32)

    def read(self, name: str, part: str) -> Tensor:
        """A whole float32 tensor of a parameter: its ``weights``, or one of `moments`."""
        pieces = [piece.parts[part].flatten().narrow(0, *piece[1:]).float() for piece in self._pieces[name]]
        return torch.cat(pieces).view(self.shapes[name])

    def _add_plain(self, model: dict[str, Any]) -> Any:
        """Without ZeRO, one file holds module and optimizer. The optimizer's state is indexed by parameter number."""
        states = model["optimizer"]["state"]
        groups = model.get(GROUPS) or [list(self.shapes)]
        for number, name in enumerate(itertools.chain.from_iterable(groups)):
            parts = {**states[number], "weights": model["module"][name]}
            self._pieces[name] = [_Piece(parts, 0, self.shapes[name].numel())]
        return states

    def _add_zero12(self, document: dict[str, Any], _: list[dict[str, torch.Size]], __: int) -> Any:
        """Each rank has one flat part of each group, and a map of where (a part of) each parameter is in it."""
        states = document["base_optimizer_state"]["state"]
        for number, fragments in enumerate(document["param_slice_mappings"]):
            parts = {**states[number], "weights": document["single_partition_of_fp32_groups"][number]}
            for name, fragment in fragments.items():
                self._pieces.setdefault(name, []).append(_Piece(parts, fragment.start, fragment.numel))
        return states

    def _add_zero3(self, document: dict[str, Any], shapes: list[dict[str, torch.Size]], num_ranks: int) -> Any:
        """Each rank has one part of each parameter. All parts have one length; the last is padded with zeros."""
        states = document["optimizer_state_dict"]["state"]
        for number, group in enumerate(shapes):
            parts = {**states[number], "weights": document["fp32_flat_groups"][number]}
            offset = 0
            for name, shape in group.items():
                pieces = self._pieces.setdefault(name, [])
                length = -(-shape.numel() // num_ranks)
                rest = shape.numel() - length * len(pieces)
                pieces.append(_Piece(parts, offset, max(0, min(length, rest))))
                offset += length
        return states


def _by_rank(saved: Path, kind: str) -> list[Path]:
    """The files of one kind, in the order of ranks. Without ZeRO there is one file, whose name has no rank."""
    ranks = {path: re.search(r"pp_rank_(\d+)", path.name) for path in saved.glob(f"*{kind}.pt")}
    return sorted(ranks, key=lambda path: int(rank[1]) if (rank := ranks[path]) else 0)


def _load(path: Path) -> Any:
    # Unpickling is safe: the file has the hash that we recorded when we wrote it.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


@torch.no_grad()
def load_whole(engine: Any, whole: WholeTensors) -> None:
    """Puts weights, moments and buffers into a fresh DeepSpeed engine of any stage and world size. Collective.

    Args:
        engine: DeepSpeed's engine, before its first step.
        whole: the tensors.
    """
    stage = engine.zero_optimization_stage()
    targets, states = masters(engine), optimizer_states(engine)
    place = _place_plain if stage == 0 else _place_zero3 if stage == 3 else _place_zero12
    place(engine, whole, "weights", targets)
    for master in targets:
        states[master] = {"step": whole.num_steps.to(master.device, copy=True)}
    for moment in whole.moments:
        values = [torch.zeros_like(master) for master in targets]
        place(engine, whole, moment, values)
        for master, value in zip(targets, values, strict=True):
            states[master][moment] = value
    refresh_weights(engine)
    for name, buffer in engine.module.named_buffers():
        if name in whole.buffers:  # the others are not persistent
            buffer.copy_(whole.buffers[name])


def _place_plain(engine: Any, whole: WholeTensors, part: str, targets: list[Tensor]) -> None:
    for (name, _), target in zip(engine.module.named_parameters(), targets, strict=True):
        target.copy_(whole.read(name, part))


def _place_zero12(engine: Any, whole: WholeTensors, part: str, targets: list[Tensor]) -> None:
    optimizer = engine.optimizer
    for parameters, target in zip(optimizer.bit16_groups, targets, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # this parameter is on other ranks
                continue
            source, own = mapping.lp_fragment_address, mapping.hp_fragment_address
            values = whole.read(optimizer.param_names[parameter], part).flatten()
            target.narrow(0, own.start, own.numel).copy_(values.narrow(0, source.start, source.numel))


def _place_zero3(engine: Any, whole: WholeTensors, part: str, targets: list[Tensor]) -> None:
    optimizer, rank = engine.optimizer, torch.distributed.get_rank()
    for parameters, target in zip(optimizer.fp16_groups, targets, strict=True):
        offset = 0
        for parameter in parameters:
            length = parameter.ds_tensor.ds_numel
            own = whole.read(optimizer.param_names[parameter], part).flatten()[rank * length : (rank + 1) * length]
            target.narrow(0, offset, len(own)).copy_(own)
            offset += length
