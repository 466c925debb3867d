"""A checkpoint of one world size and ZeRO stage, loaded at another.

DeepSpeed's own way (``ds_to_universal``, then ``load_universal``) stays within one ZeRO stage and leaves buffers
behind, among them the tokenizer's codebook. So its converter only takes the optimizer files of ZeRO 1 to 3 apart, and
what it makes of them, whole float32 tensors by parameter name, is put in place here.

A folder of whole tensors: ``zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt``, each a float32 tensor (of ZeRO 1 and 2 below
``"param"``), and ``step.pt``, the optimizer steps done. Both sides touch DeepSpeed's private state:
tests/training/test_resume.py goes from stage to stage (ZeRO 1 to 3 in the default set, the others in the slow one) and
fails when it moves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WholeTensors", "load_whole", "split_by_parameter"]

MOMENTS = ("exp_avg", "exp_avg_sq")


class WholeTensors:
    """A folder of whole tensors; one parameter is in memory at a time.

    Args:
        folder: what `split_by_parameter` made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, part: str) -> Tensor:
        """Float32 tensor of ``part`` (``fp32``, ``exp_avg``, ``exp_avg_sq``) of a parameter, flat."""
        content = _load(self._folder / "zero" / name / f"{part}.pt")
        return (content if isinstance(content, Tensor) else content["param"]).flatten()

    @property
    def num_steps(self) -> Tensor:
        """Optimizer steps done, float32, 0-d."""
        return torch.as_tensor(_load(self._folder / "step.pt"), dtype=torch.float32)


def split_by_parameter(saved: Path, folder: Path, zero_stage: int) -> None:
    """Takes a checkpoint of all ranks apart into whole tensors.

    Args:
        saved: the files that `Engine.save` wrote under its tag, of all ranks.
        folder: to write to; must not exist.
        zero_stage: that of the checkpoint.
    """
    folder.mkdir(parents=True)
    if zero_stage == 0:
        _split_plain(saved, folder)
        return
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = argparse.Namespace(
        input_folder=str(saved),
        output_folder=str(folder),
        num_extract_workers=1,  # in this process: a pool would fork one that holds Ray's and gloo's threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its own progress
        main(arguments)
    optimizer = _load(next(iter(sorted(saved.glob("*_optim_states.pt")))))["optimizer_state_dict"]
    states = optimizer["base_optimizer_state"] if zero_stage < 3 else optimizer["optimizer_state_dict"]
    torch.save(states["state"][0]["step"], folder / "step.pt")


def _split_plain(saved: Path, folder: Path) -> None:
    """Without ZeRO one file holds module and optimizer, whose state goes by the parameter's number."""
    document = _load(saved / "mp_rank_00_model_states.pt")
    states = document["optimizer"]["state"]
    buffers = set(document["buffer_names"])
    names = [name for name in document["module"] if name not in buffers]
    for number, name in enumerate(names):
        (folder / "zero" / name).mkdir(parents=True)
        parts = {"fp32": document["module"][name].float(), **{moment: states[number][moment] for moment in MOMENTS}}
        for part, tensor in parts.items():
            torch.save(tensor, folder / "zero" / name / f"{part}.pt")
    torch.save(states[0]["step"], folder / "step.pt")


def _load(path: Path) -> Any:
    # Its hash was compared with the one we wrote, so unpickling it is safe.
    return torch.load(path, map_location="cpu", weights_only=False)


def load_whole(engine: Any, whole: WholeTensors, saved: Path) -> None:
    """Puts weights, moments and buffers into a fresh DeepSpeed engine of any stage and world size. Collective.

    Args:
        engine: DeepSpeed's engine, before its first step.
        whole: the tensors.
        saved: the checkpoint's files, for the buffers.
    """
    stage = engine.zero_optimization_stage()
    place = _place_plain if stage == 0 else _place_zero3 if stage == 3 else _place_zero12
    with torch.no_grad():
        place(engine, whole)
        _copy_buffers(engine.module, saved)


def _copy_buffers(module: nn.Module, saved: Path) -> None:
    path = next(iter(sorted(saved.glob("*mp_rank_00_model_states.pt"))))  # every rank's are the same
    values = _load(path)["module"]
    for name, buffer in module.named_buffers():
        if name in values:  # the others are not persistent
            buffer.copy_(values[name])


def _place_plain(engine: Any, whole: WholeTensors) -> None:
    for name, parameter in engine.module.named_parameters():
        parameter.copy_(whole.read(name, "fp32").view_as(parameter))
        engine.optimizer.state[parameter] = {
            "step": whole.num_steps.clone(),
            **{moment: whole.read(name, moment).view_as(parameter).to(parameter.device) for moment in MOMENTS},
        }


def _place_zero12(engine: Any, whole: WholeTensors) -> None:
    """Every rank has all weights, and of each group one flat part of the float32 copies and moments."""
    optimizer = engine.optimizer
    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        for parameter in parameters:
            name = optimizer.param_names[parameter]
            weights = whole.read(name, "fp32")
            parameter.copy_(weights.view_as(parameter))
            mapping = parameter._hp_mapping
            if mapping is None:  # other ranks have it
                continue
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            mapping.hp_fragment.copy_(weights.narrow(0, source.start, source.numel))
            for moment, values in moments.items():
                part = whole.read(name, moment).narrow(0, source.start, source.numel)
                values.narrow(0, target.start, target.numel).copy_(part)
        optimizer.optimizer.state[flat] = {"step": whole.num_steps.clone(), **moments}


def _place_zero3(engine: Any, whole: WholeTensors) -> None:
    """Of each parameter every rank has one part of equal length, the last filled up with zeros."""
    optimizer, rank = engine.optimizer, torch.distributed.get_rank()
    optimizer.checkpoint_event_prologue()
    for number, (parameters, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        offset = 0
        for parameter in parameters:
            length = parameter.ds_tensor.ds_numel
            for part, values in (("fp32", flat), *moments.items()):
                own = whole.read(optimizer.param_names[parameter], part)[rank * length : (rank + 1) * length]
                values.narrow(0, offset, len(own)).copy_(own)
            offset += length
        optimizer.optimizer.state[flat] = {"step": whole.num_steps.clone(), **moments}
        computing = optimizer.fp16_partitioned_groups_flat[number]
        computing.copy_(flat)
        pieces = optimizer.unflatten(computing, optimizer.fp16_partitioned_groups[number])
        for partition, piece in zip(optimizer.fp16_partitioned_groups[number], pieces, strict=True):
            partition.data = piece.data
    optimizer.checkpoint_event_epilogue()
