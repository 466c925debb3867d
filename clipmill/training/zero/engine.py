"""DeepSpeed behind a few verbs: step, evaluate, save, load.

The traps of DeepSpeed that this module keeps from its callers are noted where each is met.
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
"""DeepSpeed's files lie in a folder of this name."""


BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default: room for gradients that wait to be sent."""
OVERLAPPED_ELEMENTS = 50_000_000
"""The same where buckets are sent while the backward pass goes on: it fills the next one meanwhile."""
FEWEST_OVERLAPPED = 8
"""Buckets of a small model: the last one of a backward pass hides behind nothing."""


def deepspeed_config(
    config: TrainingConfig, rows: int, accumulation: int, world_size: int, num_parameters: int
) -> dict[str, Any]:
    """Our settings as DeepSpeed's own JSON document, with the expert overrides merged over it.

    Args:
        config: our settings.
        rows: clips of one micro-batch on one rank.
        accumulation: micro-batches a step.
        world_size: number of ranks.
        num_parameters: of the model.
    """
    overlaps = config.zero_stage in (1, 2) and not config.offload and world_size > 1
    bucket = bucket_elements(num_parameters, overlaps)
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket}
    if config.zero_stage < 3:  # at stage 3 DeepSpeed overlaps by itself
        zero["overlap_comm"] = overlaps
    if config.offload:
        # torch's own AdamW steps on the CPU as well; DeepSpeed's would be compiled at the first start.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    guarded = _is_guarded(config)
    if guarded and config.zero_stage:
        zero["compute_grad_norm"] = False  # `Guard` does, in one pass over the flat gradients
    document: dict[str, Any] = {
        "train_batch_size": rows * accumulation * world_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if guarded else config.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # telemetry prints, not DeepSpeed
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice in every micro-step
    }
    if config.precision == "bfloat16":
        # On CUDA DeepSpeed switches an autocast of ours off and says so in a log line. No module is named whose
        # gradients may go between ranks in bfloat16: theirs stay float32.
        document["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merged(document, config.deepspeed)


def bucket_elements(num_parameters: int, overlaps: bool) -> int:
    """Gradients that are reduced together.

    A bucket is allocated whole, however few gradients there are: 2 GB beside a model of 2 MB. There are two where the
    reduction overlaps the backward pass.
    """
    if overlaps:
        return min(-(-num_parameters // FEWEST_OVERLAPPED), OVERLAPPED_ELEMENTS)
    return min(num_parameters, BUCKET_ELEMENTS)


def _is_guarded(config: TrainingConfig) -> bool:
    """Whether clipping and the choice to leave a step out are ours; else DeepSpeed's."""
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
        objective: called with one micro-batch (a dict of tensors with ``weight`` float32 [rows]) it returns the
            mean loss over the weighted rows, 0-d, and a dict of 0-d metrics of the same weighting. Its
            ``model.blocks`` are what is compiled.
        config: training settings.
        world: this process among its peers.
        rows: clips of one micro-batch on one rank.
        accumulation: micro-batches a step.
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
        # It would copy scripts into every checkpoint that convert its files: `whole_state` does.
        self.deepspeed._copy_recovery_script = lambda _: None
        self._averages = Averages(self.deepspeed, averages) if averages else None
        if config.compile:
            # A prior names its blocks, which are alike, so that one compilation serves all; a tokenizer its two halves.
            for block in cast(Any, objective).model.blocks:
                block.compile()

    @property
    def objective(self) -> nn.Module:
        """The module being trained, without DeepSpeed's wrapping."""
        return self.deepspeed.module

    @contextlib.contextmanager
    def step(self, lr: float, average_weight: float) -> Iterator[None]:
        """Holds the micro-steps of one step.

        Args:
            lr: learning rate of this step.
            average_weight: of the new weights in their average, if one is kept.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr  # the schedule is a function of the step: no scheduler state to restore
        # The forward pass moves buffers (statistics, codebook) before anybody knows what the gradients are.
        restores = self._config.bad_steps == "skip"
        before = [(buffer, buffer.clone()) for buffer in self.objective.buffers()] if restores else []
        yield
        skipped = self.skipped
        for buffer, value in before:
            buffer.copy_(torch.where(skipped, value, buffer))
        if self._averages is not None:
            self._averages.update(average_weight, (~skipped).float())

    def micro_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, backward, and on the last micro-batch of a step the optimizer.

        Args:
            batch: on the device.

        Returns:
            The mean loss over this micro-batch's rows and its metrics, detached, on the device.
        """
        self.deepspeed.train()
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
        # Not compiled: that would take as long again, for a few batches now and then.
        with torch.compiler.set_stance("force_eager"):
            return self.deepspeed(batch)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that will be exported: their average, if one is kept. Collective."""
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
        """Whether the last step was not applied, for what its gradients were, bool 0-d on the device."""
        return ~self.grad_norm.isfinite() if self._guard is None else self._guard.skipped

    @property
    def usual_norm(self) -> list[float] | None:
        """State for a checkpoint beside `save`: see `Guard.usual`; none where nobody keeps it."""
        if self._guard is None or self._config.spike_factor is None:
            return None  # what was usual before would be a trap for a later run with a factor
        return self._guard.usual.tolist()

    @usual_norm.setter
    def usual_norm(self, usual: list[float] | None) -> None:
        if self._guard is not None and usual is not None:
            self._guard.usual = torch.tensor(usual)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a batch where the model is, without waiting for them."""
        return {name: self._moved(value) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.world.device.type == "cuda":
            tensor = tensor.pin_memory()  # from other memory a copy waits for everything before it
        return tensor.to(self.world.device, non_blocking=True)

    @property
    def num_groups(self) -> int:
        """Groups of the optimizer's parameters; checkpoints of another number have another layout."""
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
        """This rank's part of the weights, in float32, and of the optimizer's states of them."""
        states = optimizer_states(self.deepspeed)
        own = masters(self.deepspeed)
        return own + [value for master in own for value in states.get(master, {}).values()]

    def save(self, folder: Path, on_written: Callable[[], object] = lambda: None) -> None:
        """Writes this rank's part of weights and optimizer. Collective.

        Args:
            folder: on this node's disk.
            on_written: called once this rank's files are written, before it waits for the others.

        Raises:
            Exception: a file could not be written; raised on that rank alone, after DeepSpeed's barriers.
        """
        ours = self.deepspeed.checkpoint_engine
        writer = Writer(ours, on_written)
        self.deepspeed.checkpoint_engine = writer
        try:
            # save_latest writes the pointer file whose absence makes load_checkpoint start afresh in silence:
            # our own commit record takes its place.
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
    """The whole float32 state dict of a checkpoint, read from its files when it is needed; averages if they were kept.

    Args:
        folder: holds the files of all ranks, as `Engine.save` wrote them, until the last tensor has been read.
        zero_stage: of the run that saved.
    """
    _import_deepspeed()  # the files hold objects of its
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

    torch lets convolutions compute in TF32 unless told otherwise. Timing pays where shapes stay the same, as they do in
    a training; another process may then choose other kernels, whose last digits differ.

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
    """Imports DeepSpeed late (it takes seconds) and keeps it quiet and from compiling at every start."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU every start would compile a shared-memory all-reduce (up to 90 s); gloo does without. Private name:
    # tests/training/zero/test_engine.py fails when it moves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO-3 calls collectives by names that torch 2.13 renames: a line for every step.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    return deepspeed
