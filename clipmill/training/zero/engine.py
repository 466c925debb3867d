"""DeepSpeed behind a few verbs: step, evaluate, save, load.

Comments name the traps of DeepSpeed, where this module avoids them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipmill.config import TrainingConfig
from clipmill.errors import UserError
from clipmill.models.tensor_file import Deferred
from clipmill.training.decay import group_names, parameter_groups
from clipmill.training.world import World
from clipmill.training.zero.averaging import AVERAGE, Averages, BufferAverages, averaged_buffers
from clipmill.training.zero.conversion import GROUPS, WholeTensors, load_whole
from clipmill.training.zero.guard import Guard
from clipmill.training.zero.overlap import Overlap
from clipmill.training.zero.partitions import masters, optimizer_states
from clipmill.training.zero.writer import Writer

__all__ = ["Engine", "bucket_elements", "deepspeed_config", "set_cuda_arithmetic", "whole_state"]

TAG = "state"
"""Name of the folder with DeepSpeed's files."""


BUCKET_ELEMENTS = 500_000_000
"""Gradients per bucket: DeepSpeed's default."""
OVERLAPPED_ELEMENTS = 50_000_000
"""Maximum number of gradients per bucket if a bucket is sent while the backward pass fills the next one."""
FEWEST_OVERLAPPED = 8
"""Minimum number of such buckets: the last one is sent after the backward pass, so it should be small."""


def deepspeed_config(
    config: TrainingConfig, rows: int, accumulation: int, world_size: int, num_parameters: int
) -> dict[str, Any]:
    """Our settings as DeepSpeed's own JSON document, with the expert overrides merged over it.

    Args:
        config: our settings.
        rows: clips of one micro-batch on one rank.
        accumulation: micro-batches per step.
        world_size: number of ranks.
        num_parameters: of the model.
    """
    overlaps = config.zero_stage in (1, 2) and not config.offload and world_size > 1
    bucket = bucket_elements(num_parameters, overlaps)
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket}
    if config.zero_stage < 3:  # at stage 3 DeepSpeed overlaps by default
        zero["overlap_comm"] = overlaps
    if config.offload:
        # torch's AdamW also works on the CPU; DeepSpeed's would be compiled at the first start.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    guarded = _is_guarded(config)
    if guarded and config.zero_stage:
        zero["compute_grad_norm"] = False  # `Guard` computes it, in one pass over the flat gradients
    document: dict[str, Any] = {
        "train_batch_size": rows * accumulation * world_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if guarded else config.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # never: our telemetry prints
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice in every micro-step
    }
    if config.precision == "bfloat16":
        # On CUDA DeepSpeed would disable an autocast of ours. The list is empty: all gradients are reduced in float32.
        document["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merged(document, config.deepspeed)


def bucket_elements(num_parameters: int, overlaps: bool) -> int:
    """Number of gradients that are reduced together.

    A bucket is allocated whole, even for a small model: the default takes 2 GB beside a model of 2 MB. There are two
    buckets if the reduction overlaps the backward pass.
    """
    if overlaps:
        return min(-(-num_parameters // FEWEST_OVERLAPPED), OVERLAPPED_ELEMENTS)
    return min(num_parameters, BUCKET_ELEMENTS)


def _is_guarded(config: TrainingConfig) -> bool:
    """Whether `Guard` clips and skips steps, or DeepSpeed does."""
    return config.zero_stage < 3 and not config.offload


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


class Engine:
    """A model with its optimizer under ZeRO.

    Args:
        objective: called with one micro-batch (a dict of tensors with ``weight`` float32 [rows]). It returns the mean
            loss over the weighted rows, 0-d, and a dict of 0-d metrics with the same weighting. Its ``model.blocks``
            are compiled.
        config: training settings.
        world: this rank and its peers.
        rows: clips of one micro-batch on one rank.
        accumulation: micro-batches per step.
    """

    def __init__(
        self, objective: nn.Module, config: TrainingConfig, world: World, rows: int, accumulation: int
    ) -> None:
        deepspeed = _import_deepspeed()
        from deepspeed.runtime.config import DeepSpeedConfigError

        set_cuda_arithmetic(config.precision)
        self.world, self._config, self._accumulation = world, config, accumulation
        if config.compile:
            _require_compiler(world.device)
        averages = BufferAverages(objective) if config.weights_ema else None
        objective.to(world.device)
        groups = parameter_groups(objective, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self._group_names = group_names(objective, groups)
        self._guard = None
        if _is_guarded(config):
            self._guard = Guard(
                optimizer,
                config.grad_clip,
                num_ranks=world.size,
                partitioned=config.zero_stage > 0,
                spike_factor=config.spike_factor,
            )
        num_parameters = sum(parameter.numel() for parameter in objective.parameters())
        document = deepspeed_config(config, rows, accumulation, world.size, num_parameters)
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=objective, optimizer=optimizer, config=document, dist_init_required=False
            )
        except (ValueError, TypeError, KeyError, AssertionError, DeepSpeedConfigError) as error:
            if not config.deepspeed:
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"DeepSpeed refuses training.deepspeed={config.deepspeed}: {reason}") from error
        zero = document["zero_optimization"]
        if zero.get("overlap_comm") and zero["stage"] in (1, 2) and world.device.type == "cpu" and not config.offload:
            Overlap(self.deepspeed.optimizer)
        # DeepSpeed would copy conversion scripts into every checkpoint; `whole_state` converts instead.
        self.deepspeed._copy_recovery_script = lambda _: None
        self._averages = Averages(self.deepspeed, averages) if averages else None
        if config.compile:
            # A prior's blocks are alike, so one compilation serves all. A tokenizer has two halves here.
            for block in cast(Any, objective).model.blocks:
                block.compile()

    @property
    def objective(self) -> nn.Module:
        """The trained module, without DeepSpeed's wrapper."""
        return self.deepspeed.module

    @contextlib.contextmanager
    def step(self, lr: float, average_weight: float) -> Iterator[None]:
        """Context of the micro-steps of one step.

        Args:
            lr: learning rate of this step.
            average_weight: weight of the new weights in the running average, if there is one.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr  # the schedule is a function of the step, so a resume needs no scheduler state
        # Buffers are kept in case the step is skipped: the forward pass changes them (statistics, codebook) before the
        # gradients are known.
        restores = self._config.bad_steps == "skip"
        before = [(buffer, buffer.clone()) for buffer in self.objective.buffers()] if restores else []
        yield
        skipped = self.skipped
        for buffer, value in before:
            buffer.copy_(torch.where(skipped, value, buffer))
        if self._averages is not None:
            self._averages.update(average_weight, (~skipped).float())

    def micro_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward pass, and after the last micro-batch of a step the optimizer.

        Args:
            batch: on the device.

        Returns:
            The mean loss over this micro-batch's rows and its metrics, detached, on the device.
        """
        self.deepspeed.train()
        loss, metrics = self.deepspeed(batch)
        # DeepSpeed averages over ranks and micro-batches. We need the sum over rows divided by the global batch, so
        # that padding rows of uneven ranks have no weight.
        share = batch["weight"].sum() * (self.world.size * self._accumulation / self._config.global_batch)
        self.deepspeed.backward(loss * share)
        self.deepspeed.step()  # finds out which micro-batch ends the step; also clips and zeroes gradients
        return loss.detach(), {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward without dropout or statistics updates."""
        self.deepspeed.eval()
        # Not compiled: a second compilation is not worth it for a few batches from time to time.
        with torch.compiler.set_stance("force_eager"):
            return self.deepspeed(batch)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """In the block, the model has the weights that would be exported: the average, if there is one. Collective."""
        return contextlib.nullcontext() if self._averages is None else self._averages.in_place()

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradients before clipping, 0-d on the device."""
        if self._guard is not None:
            assert self._guard.norm is not None
            return self._guard.norm
        return torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self.world.device)

    @property
    def skipped(self) -> Tensor:
        """Whether the last step was skipped because of its gradients, bool 0-d on the device."""
        return ~self.grad_norm.isfinite() if self._guard is None else self._guard.skipped

    @property
    def usual_norm(self) -> list[float] | None:
        """State for a checkpoint in addition to `save`: see `Guard.usual`. None without a ``spike_factor``."""
        if self._guard is None or self._config.spike_factor is None:
            return None  # an outdated norm would mislead a later run that has a factor
        return self._guard.usual.tolist()

    @usual_norm.setter
    def usual_norm(self, usual: list[float] | None) -> None:
        if self._guard is not None and usual is not None:
            self._guard.usual = torch.tensor(usual)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Copies the tensors of a batch to the model's device, without waiting for the copies."""
        return {name: self._moved(value) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.world.device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from pageable memory would wait for all earlier work
        return tensor.to(self.world.device, non_blocking=True)

    @property
    def num_groups(self) -> int:
        """Number of the optimizer's parameter groups; it is part of a checkpoint's layout."""
        return len(self._group_names)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether weights, optimizer states and buffers are all finite. Collective; waits for the device."""
        buffers = [buffer for buffer in self.objective.buffers() if buffer.is_floating_point()]
        largest = [torch.linalg.vector_norm(part, torch.inf) for part in [*self._states(), *buffers] if part.numel()]
        finite = torch.stack([value.to(self.world.device) for value in largest]).isfinite().all()
        return not self.world.any(not finite)

    def checkpoint_bytes(self) -> int:
        """Bytes that `save` writes on this rank, within a few KiB."""
        stage, is_first = self._config.zero_stage, self.world.rank == 0
        parts = self._states() if stage or is_first else []
        if stage == 3 or is_first:
            parts += self.objective.buffers()
        if stage in (1, 2) and is_first:
            parts += self.objective.parameters()
        return sum(part.nbytes for part in parts)

    def _states(self) -> list[Tensor]:
        """This rank's part of the float32 weights and of the optimizer's states."""
        states = optimizer_states(self.deepspeed)
        own = masters(self.deepspeed)
        return own + [value for master in own for value in states.get(master, {}).values()]

    def save(self, folder: Path, on_written: Callable[[], object] = lambda: None) -> None:
        """Writes this rank's part of weights and optimizer. Collective.

        Args:
            folder: on this node's disk.
            on_written: called once this rank's files are written, before it waits for the others.

        Raises:
            Exception: a file could not be written; raised only on that rank, after DeepSpeed's barriers.
        """
        ours = self.deepspeed.checkpoint_engine
        writer = Writer(ours, on_written)
        self.deepspeed.checkpoint_engine = writer
        try:
            # save_latest would write a pointer file; without it, load_checkpoint silently starts afresh. Our commit
            # record takes its place.
            state = {GROUPS: self._group_names}
            self.deepspeed.save_checkpoint(str(folder), tag=TAG, client_state=state, save_latest=False)
        finally:
            self.deepspeed.checkpoint_engine = ours
        if writer.error is not None:
            raise writer.error

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote at the same world size, ZeRO stage and offload. Collective."""
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {folder}")

    def load_converted(self, folder: Path, zero_stage: int) -> None:
        """Restores what `save` wrote in any layout. Collective.

        Args:
            folder: the files of all ranks.
            zero_stage: of the run that saved.
        """
        load_whole(self.deepspeed, WholeTensors(folder / TAG, zero_stage))


def whole_state(folder: Path, zero_stage: int) -> dict[str, Deferred]:
    """The whole float32 state dict of a checkpoint, with averages if there are any. Tensors are read when needed.

    Args:
        folder: the files of all ranks, as `Engine.save` wrote them; keep it until the last tensor has been read.
        zero_stage: of the run that saved.
    """
    _import_deepspeed()  # the files contain DeepSpeed's objects
    whole = WholeTensors(folder / TAG, zero_stage)
    part = AVERAGE if AVERAGE in whole.moments else "weights"
    weights = {
        name: Deferred(tuple(shape), torch.float32, functools.partial(whole.read, name, part))
        for name, shape in whole.shapes.items()
    }
    buffers = averaged_buffers(whole.buffers)
    return weights | {
        name: Deferred(tuple(value.shape), value.dtype, functools.partial(torch.Tensor.detach, value))
        for name, value in buffers.items()
    }


def set_cuda_arithmetic(precision: str) -> None:
    """Sets, for this whole process, how CUDA computes float32 products, and lets cuDNN time its kernels.

    By default torch computes convolutions in TF32. Timing pays off because shapes stay the same in a training. Two
    processes may choose different kernels, whose last digits differ.

    Args:
        precision: of the training.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def _require_compiler(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise UserError(f"training.compile=true needs a compiler, and there is no {compiler}; install one, or unset it")


def _import_deepspeed() -> Any:
    """Imports DeepSpeed when needed, because that takes seconds; silences it, and avoids compiling at each start."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU every start would compile a shared-memory all-reduce (up to 90 s), which gloo does not need. The name is
    # private: tests/training/zero/test_engine.py fails if it changes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO-3 uses deprecated names of collectives: torch 2.13 would warn in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    return deepspeed
