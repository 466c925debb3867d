"""What a rank of several holds is what `clipmill estimate` says: measured on two ranks, dry at 64."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from clipmill.config import RunConfig, load_config
from clipmill.models.prior import Prior
from clipmill.training.estimate import FLOAT, estimate, model_state_bytes
from clipmill.training.world import World, join_world
from clipmill.training.zero.engine import Engine, bucket_elements
from tests.ports import free_port

RATES = {"mfu": 0.4, "peak_tflops": 989.0, "gpus_per_node": 8, "upload_mb_per_second": 200.0}
WORLD_SIZE = 64


class Objective(torch.nn.Module):
    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.model = prior

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch["codes"]).mean(), {}


def become_rank(rank: int, world_size: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["DS_ACCELERATOR"] = "cpu"


# ----------------------------------------------------------------------------------------------- two ranks


def two_rank_config(zero_stage: int, hidden_dim: int, num_layers: int) -> RunConfig:
    """Large beside a process, with few tokens: activations are next to nothing."""
    model = {"hidden_dim": hidden_dim, "num_layers": num_layers, "dropout": 0, "attention_dropout": 0}
    training = {"zero_stage": zero_stage, "global_batch": 2}
    settings = [f"prior.model.{name}={value}" for name, value in model.items()]
    settings += [f"prior.training.{name}={value}" for name, value in training.items()]
    clip = ["data.clip.num_frames=4", "data.clip.resolution=16"]
    return load_config([], ["root=x", *clip, "vqvae.model.num_codes=64", *settings])


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def hold(rank: int, port: int, zero_stage: int, folder: Path) -> None:
    """Writes what a rank holds between the backward pass and the step, and the bytes of a checkpoint of both."""
    become_rank(rank, 2)
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    world = join_world()

    def trained(hidden_dim: int, num_layers: int) -> Engine:
        config = two_rank_config(zero_stage, hidden_dim, num_layers)
        prior = Prior(config.prior.model, (1, 4, 4), 64, torch.randn(64, 256))
        engine = Engine(Objective(prior), config.prior.training, world, rows=1, accumulation=1)
        backward(engine)
        engine.deepspeed.step()
        return engine

    def backward(engine: Engine) -> None:
        loss, _ = engine.deepspeed({"codes": torch.zeros(1, 1, 4, 4, dtype=torch.int64)})
        engine.deepspeed.backward(loss)

    trained(16, 1)  # code and what is allocated once
    before = resident_bytes()
    engine = trained(512, 8)
    looks = []
    for _ in range(3):  # what the allocator has not given back yet comes on top, now and then
        backward(engine)
        looks.append(resident_bytes() - before)
        engine.deepspeed.step()
    held = min(looks)
    engine.save(folder)
    world.barrier()
    if rank == 0:
        saved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        (folder / "measured.json").write_text(json.dumps({"held": held, "checkpoint": saved}))
    world.leave()


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_hold_what_is_estimated(tmp_path: Path, zero_stage: int) -> None:
    torch.multiprocessing.spawn(hold, args=(free_port(), zero_stage, tmp_path), nprocs=2)
    measured = json.loads((tmp_path / "measured.json").read_text())
    expected = estimate(two_rank_config(zero_stage, 512, 8), 2, **RATES)
    memory = expected.states[zero_stage]
    held = memory.weights + memory.gradients + memory.optimizer
    if zero_stage == 3:  # its bucket stays; what was never written to takes no memory on a CPU
        held += FLOAT * bucket_elements(expected.num_parameters, overlaps=False)
    assert measured["held"] == pytest.approx(held, rel=0.1)
    assert measured["checkpoint"] == pytest.approx(expected.checkpoint_bytes, rel=0.1)


# ------------------------------------------------------------------------------------------- 64 ranks, dry


def preset_config(preset: str, zero_stage: int) -> RunConfig:
    settings = ["precision=bfloat16", "global_batch=512", f"zero_stage={zero_stage}"]
    shapes = ["data.clip.resolution=128", "vqvae.model.num_codes=1024", f"prior.model.preset={preset}"]
    return load_config([], ["root=x", *shapes, *(f"prior.training.{setting}" for setting in settings)])


class DryWorld(World):
    """Rank 0 of 64, none of which is there."""

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank, self.local_size = 0, WORLD_SIZE, 0, 8
        self.device = torch.device("cpu")


class DryObjective(Objective):
    def _apply(self, *_: Any, **__: Any) -> DryObjective:  # fake parameters refuse to be moved, even to where they are
        return self


def run_dry(_: int, preset: str, zero_stage: int, folder: Path) -> None:
    """Builds and shards a prior for 64 ranks, and takes it through a forward and backward pass, on fake tensors."""
    become_rank(0, WORLD_SIZE)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    config = preset_config(preset, zero_stage)
    with FakeTensorMode(allow_non_fake_inputs=True):
        prior = Prior(config.prior.model, (4, 32, 32), 1024, None)
        num_parameters = sum(parameter.numel() for parameter in prior.parameters())
        largest_block = max(sum(parameter.numel() for parameter in block.parameters()) for block in prior.blocks)
        engine = Engine(DryObjective(prior), config.prior.training, DryWorld(), rows=8, accumulation=1)
        # The step itself looks at the norm of the gradients, which fake ones do not have.
        loss, _ = engine.deepspeed({"codes": torch.zeros(8, 4, 32, 32, dtype=torch.int64)})
        engine.deepspeed.backward(loss)
        optimizer = engine.deepspeed.optimizer
        if zero_stage == 3:
            weights = [parameter.ds_tensor for parameter in prior.parameters()]
            gradients = [optimizer.grad_partitions_flat_buffer]
            copies = optimizer.fp32_partitioned_groups_flat
        else:
            weights = list(prior.parameters())
            gradients = [part for parts in optimizer.averaged_gradients.values() for part in parts]
            copies = optimizer.single_partition_of_fp32_groups
        optimizer.optimizer.param_groups[0]["params"] = list(copies)  # stage 3 has them there only while it steps
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        optimizer.optimizer.step()
        moments = [value for state in optimizer.optimizer.state.values() for value in state.values() if value.dim()]
        measured = {
            "num_parameters": num_parameters,
            "largest_block": largest_block,
            "weights": sum(tensor.nbytes for tensor in weights),
            "gradients": sum(tensor.nbytes for tensor in gradients),
            "optimizer": sum(tensor.nbytes for tensor in [*copies, *moments]),
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    (folder / "measured.json").write_text(json.dumps(measured))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "zero_stage"),
    [("1b", 1), ("3b", 2), ("7b", 1), pytest.param("7b", 3, marks=pytest.mark.ci)],
)
def test_64_ranks_shard_the_presets_without_the_memory(tmp_path: Path, preset: str, zero_stage: int) -> None:
    torch.multiprocessing.spawn(run_dry, args=(preset, zero_stage, tmp_path))
    measured = json.loads((tmp_path / "measured.json").read_text())
    num_parameters = measured["num_parameters"]
    assert num_parameters == pytest.approx(float(preset[:-1]) * 1e9, rel=0.08)
    expected = model_state_bytes(num_parameters, zero_stage, WORLD_SIZE, measured["largest_block"], accumulation=1)
    for part in ("weights", "gradients", "optimizer"):  # each tensor's part is rounded up
        assert measured[part] == pytest.approx(getattr(expected, part), rel=1e-3), part
    assert measured["resident"] < 2 * 2**30 < FLOAT * num_parameters
    assert estimate(preset_config(preset, zero_stage), WORLD_SIZE, **RATES).states[zero_stage] == expected
