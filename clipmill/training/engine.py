"""DeepSpeed behind four verbs: start, micro-step, all-reduce, consolidate.

The traps of DeepSpeed that this module keeps from its callers are noted where each is met.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipmill.config import TrainingConfig
from clipmill.training.conversion import WholeTensors, load_whole, split_by_parameter

__all__ = ["Engine", "World", "consolidated_state", "deepspeed_config", "join_world"]

CONTROL_TIMEOUT_SECONDS = 7200.0
TAG = "state"
"""DeepSpeed's files lie in a folder of this name."""


class World:
    """This process among its peers.

    Attributes:
        rank: index of this process among ``size``.
        local_rank: index among the ``local_size`` processes of this machine.
        device: where the model lives.
    """

    def __init__(self, *, is_ours: bool) -> None:
        self._is_ours = is_ours
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        # Control messages go over gloo: on NCCL even one integer would wait for the GPU's stream.
        # Peers wait in it while rank 0 waits for the slowest node's upload, which must run out of patience first.
        patience = datetime.timedelta(seconds=CONTROL_TIMEOUT_SECONDS)
        self._control = dist.new_group(backend="gloo", timeout=patience) if self.size > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self._control is None:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flags.item())

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sum over all ranks, in float64."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self._control is not None:
            dist.all_reduce(sums, group=self._control)
        return sums.tolist()

    def from_rank_zero(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, on every rank; an error it raises there is raised on every rank."""
        if self._control is None:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except Exception as error:  # the peers must not wait for a broadcast that never comes
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def raise_first(self, error: Exception | None) -> None:
        """Raises the error of the lowest rank that has one, on every rank."""
        errors = [error]
        if self._control is not None:
            errors = [None] * self.size
            dist.all_gather_object(errors, error, group=self._control)
        for first in errors:
            if first is not None:
                raise first

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self._control is not None:
            dist.barrier(group=self._control)

    def leave(self) -> None:
        """Ends the process group, unless Ray Train, which made it, will. Collective.

        A rank that merely exits tears connections down that its peers may still close: now and then one aborts.
        """
        if self._is_ours:
            self.barrier()
            dist.destroy_process_group()


def join_world() -> World:
    """Joins the process group of Ray Train or torchrun, or makes one of a single process."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:  # DeepSpeed would look for MPI unless all five are set
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(is_ours=is_ours)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def deepspeed_config(config: TrainingConfig, rows: int, accumulation: int, world_size: int) -> dict[str, Any]:
    """Our settings as DeepSpeed's own JSON document, with the expert overrides merged over it.

    Args:
        config: our settings.
        rows: clips of one micro-batch on one rank.
        accumulation: micro-batches a step.
        world_size: number of ranks.
    """
    document: dict[str, Any] = {
        "train_batch_size": rows * accumulation * world_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,  # telemetry prints, not DeepSpeed
    }
    return _merged(document, config.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


class Engine:
    """A model with its optimizer under ZeRO.

    Args:
        objective: called with one micro-batch (a dict of tensors with ``weight`` float32 [rows]) it returns the
            mean loss over the weighted rows, 0-d, and a dict of 0-d metrics of the same weighting.
        config: training settings.
        world: this process among its peers.
        rows: clips of one micro-batch on one rank.
        accumulation: micro-batches a step.
    """

    def __init__(
        self, objective: nn.Module, config: TrainingConfig, world: World, rows: int, accumulation: int
    ) -> None:
        deepspeed = _import_deepspeed()
        self.world, self._config, self._accumulation = world, config, accumulation
        objective.to(world.device)
        optimizer = torch.optim.AdamW(
            objective.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=world.device.type == "cuda",
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(config, rows, accumulation, world.size),
            dist_init_required=False,
        )

    @property
    def objective(self) -> nn.Module:
        """The module being trained, without DeepSpeed's wrapping."""
        return self.deepspeed.module

    def micro_step(self, batch: dict[str, Any], lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, backward, and on the last micro-batch of a step the optimizer.

        Returns:
            The mean loss over this micro-batch's rows and its metrics, detached, on the device.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr  # the schedule is a function of the step: no scheduler state to restore
        self.deepspeed.train()
        with self._autocast():
            loss, metrics = self.deepspeed(batch)
        # DeepSpeed averages over ranks and micro-batches; what we want is the sum over rows divided by the global
        # batch, in which padding rows of uneven ranks weigh nothing.
        share = batch["weight"].sum() * (self.world.size * self._accumulation / self._config.global_batch)
        self.deepspeed.backward(loss * share)
        self.deepspeed.step()  # knows itself which micro-batch ends the step; clips and zeroes too
        return loss.detach(), {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward without dropout or statistics updates."""
        self.deepspeed.eval()
        with self._autocast():
            return self.deepspeed(batch)

    def grad_norm(self) -> dict[str, float]:
        """``{"grad_norm": ...}``, the global norm of the last step before clipping; empty at ZeRO stage 0 on float32,
        for which DeepSpeed keeps none.
        """
        norm = self.deepspeed.get_global_grad_norm()
        return {"grad_norm": float(norm)} if norm else {}

    def save(self, folder: Path) -> None:
        """Writes this rank's part of weights and optimizer. Collective."""
        # save_latest writes the pointer file whose absence makes load_checkpoint start afresh in silence:
        # our own commit record takes its place. DeepSpeed's converter refuses files without the (empty) client state.
        client_state: dict[str, Any] = {"universal_checkpoint_info": {}}
        self.deepspeed.save_checkpoint(str(folder), tag=TAG, client_state=client_state, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote at the same world size and ZeRO stage. Collective."""
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {folder}")

    def load_converted(self, folder: Path, zero_stage: int) -> None:
        """Restores what `save` wrote at any world size and this ZeRO stage. Collective.

        Args:
            folder: the files of all ranks; another folder is made beside it.
            zero_stage: of the run that saved.
        """
        whole = folder.with_name(f"{folder.name}-whole")
        if self.world.local_rank == 0:
            shutil.rmtree(whole, ignore_errors=True)
            split_by_parameter(folder / TAG, whole, zero_stage)
        self.world.barrier()
        load_whole(self.deepspeed, WholeTensors(whole), folder / TAG)
        self.world.barrier()
        if self.world.local_rank == 0:
            shutil.rmtree(whole)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._config.precision == "bfloat16":
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def consolidated_state(folder: Path) -> dict[str, Tensor]:
    """The whole float32 state dict of a checkpoint of any ZeRO stage, on the CPU.

    Args:
        folder: holds the files of all ranks, as `Engine.save` wrote them.
    """
    _import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if any((folder / TAG).glob("*_optim_states.pt")):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its own progress
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG))
    # Without ZeRO the module is whole in one file. It was hashed when we wrote it, so unpickling it is safe.
    return torch.load(folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]


def _import_deepspeed() -> Any:
    """Imports DeepSpeed late (it takes seconds) and keeps it quiet and from compiling at every start."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU every start would compile a shared-memory all-reduce (up to 90 s); gloo does without. Private name:
    # tests/training/test_engine.py fails when it moves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO-3 calls collectives by names that torch 2.13 renames: a line for every step.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    return deepspeed
