from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clipmill.config import RunConfig, load_config
from clipmill.models.prior import Prior
from clipmill.training.estimate import activation_bytes, estimate, model_state_bytes
from clipmill.training.kernels import saved_bytes
from clipmill.training.world import join_world
from clipmill.training.zero.engine import Engine

RATES = {"mfu": 0.4, "peak_tflops": 989.0, "gpus_per_node": 8, "upload_mb_per_second": 200.0}


def config_of(*assignments: str) -> RunConfig:
    sizes = ["num_layers=3", "hidden_dim=48", "num_heads=4", "dropout=0.1", "attention_dropout=0"]
    return load_config(
        [],
        [
            "root=x",
            "data.clip.num_frames=4",
            "data.clip.resolution=32",
            "vqvae.model.num_codes=64",
            *(f"prior.model.{size}" for size in sizes),
            *assignments,
        ],
    )


@pytest.mark.parametrize("style", ["videogpt", "modern"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_holds(style: str, precision: str) -> None:
    """Without dropout, and with a head of keys for each of queries, a CPU keeps what a GPU does."""
    config = config_of(f"prior.model.style={style}", "prior.model.dropout=0", f"prior.training.precision={precision}")
    prior = Prior(config.prior.model, (1, 8, 8), 64, torch.randn(64, 256)).train()
    codes = torch.randint(64, (4, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        measured = saved_bytes(lambda: prior.loss(codes).sum(), [*prior.parameters(), *prior.buffers()])
    assert activation_bytes(config, 4, checkpointed_share=0.0) == pytest.approx(measured, rel=0.1)


def test_scores_are_never_kept_and_dropout_costs_a_byte() -> None:
    quiet, noisy = (
        activation_bytes(config_of(f"prior.model.dropout={p}", f"prior.model.attention_dropout={p}"), 4, 0.0)
        for p in (0.0, 0.1)
    )
    assert noisy - quiet == 3 * 2 * 4 * 64 * 48  # layers, dropouts, clips, tokens, channels


def test_the_published_settings_fit_80_gib_with_the_settings_for_gpus() -> None:
    """145 GiB were counted for BAIR's prior by walking autograd's saved tensors, independently of this module."""
    bair = estimate(load_config(["configs/bair.yaml"]), 1, **RATES)
    assert (bair.states[0].total + bair.activations) / 2**30 == pytest.approx(145, rel=0.1)
    for name in ("bair", "ucf101", "tgif", "moving-mnist"):
        config = load_config([f"configs/{name}.yaml", "configs/gpu.yaml"])
        for stage in ("vqvae", "prior"):
            result = estimate(config, 1, **RATES, stage=stage)  # type: ignore[arg-type]
            assert result.largest_rows[1] >= result.rows, (name, stage)
            assert (result.states[1].total + result.activations) / 2**30 < 75, (name, stage)


def test_time_and_the_micro_batch_that_fits() -> None:
    config = config_of("prior.training.steps=1000", "prior.training.global_batch=8")
    one, two = (estimate(config, gpus, **RATES) for gpus in (1, 2))
    assert one.hours == pytest.approx(1000 * 8 * one.tokens_per_clip / one.tokens_per_day * 24)
    assert two.hours == pytest.approx(one.hours / 2)
    assert (one.states[0].buffers, two.states[0].buffers) == (0, 4 * one.num_parameters)
    assert one.largest_rows == (8, 8, 8, 8)
    room = (one.states[0].total + activation_bytes(config, 5, 0.0) + 1000) / 0.94 / 2**30
    assert estimate(config, 1, **RATES, memory_gib=room).largest_rows[0] == 5
    assert estimate(config, 1, **RATES, memory_gib=1e-6).largest_rows == (0, 0, 0, 0)


def test_a_rectangle_has_the_latents_of_its_shape() -> None:
    """And a prior that is conditioned on frames is estimated with frames of that shape."""
    square, wide, whole = (
        estimate(config_of(f"data.clip.resolution={size}", "prior.model.condition=frames"), 1, **RATES)
        for size in ("[36,36]", "[36,64]", "[64,64]")
    )
    assert [each.tokens_per_clip for each in (square, wide, whole)] == [9 * 9, 9 * 16, 16 * 16]
    assert square.activations < wide.activations < whole.activations


@pytest.mark.parametrize("style", ["videogpt", "modern"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_checkpointed_block_keeps_its_input(style: str, precision: str) -> None:
    inputs = []
    sizes = [f"prior.model.style={style}", f"prior.training.precision={precision}"]
    estimates = []
    for num_layers in (2, 3):
        config = config_of(*sizes, f"prior.model.num_layers={num_layers}")
        estimates.append(activation_bytes(config, 4, checkpointed_share=1.0))
    prior = Prior(config.prior.model, (1, 8, 8), 64, torch.randn(64, 256)).train()
    prior.blocks[1].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].nbytes))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        prior.loss(torch.randint(64, (4, 1, 8, 8)))
    assert estimates[1] - estimates[0] == inputs[0]


@pytest.mark.parametrize(
    ("preset", "rows", "compiled", "measured"),
    [("100m", 48, False, 22.53), ("100m", 128, True, 48.34), ("1b", 24, True, 54.41)],
)
def test_memory_is_what_an_h100_took(preset: str, rows: int, compiled: bool, measured: float) -> None:
    """GiB at most, as `benchmarks/prior.py` measured them on one GPU; what compiled blocks keep was fitted to these."""
    training = {"precision": "bfloat16", "compile": str(compiled).lower(), "zero_stage": 0, "global_batch": rows}
    sizes = [f"prior.model.preset={preset}", "data.clip.num_frames=16", "data.clip.resolution=64"]
    settings = [f"prior.training.{name}={value}" for name, value in training.items()]
    config = load_config([], ["root=x", "vqvae.model.num_codes=1024", *sizes, *settings])
    expected = estimate(config, 1, **RATES)
    assert (expected.states[0].total + expected.activations) / 2**30 == pytest.approx(measured, rel=0.1)


class Objective(torch.nn.Module):
    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.model = prior

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.model.loss(batch["codes"]).mean(), {}


def engine_config(stage: int) -> RunConfig:
    return config_of(f"prior.training.zero_stage={stage}", "prior.model.num_layers=6", "prior.model.hidden_dim=96")


def measure(_: int, folder: Path) -> None:
    """Writes what one step and one checkpoint at each stage take, from a process of its own."""
    measured = {}
    for stage in (0, 1, 2):
        config = engine_config(stage)
        prior = Prior(config.prior.model, (1, 8, 8), 64, torch.randn(64, 256))
        engine = Engine(Objective(prior), config.prior.training, join_world(), rows=32, accumulation=1)
        with engine.step(lr=1e-3, average_weight=0.0):
            engine.micro_step({"codes": torch.randint(64, (32, 1, 8, 8)), "weight": torch.ones(32)})
        optimizer = engine.deepspeed.optimizer
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        moments = sum(value.nbytes for state in states for value in state.values() if value.dim() > 0)
        copies = sum(part.nbytes for part in getattr(optimizer, "single_partition_of_fp32_groups", []))
        engine.save(folder / str(stage))
        measured[stage] = {
            "num_parameters": sum(parameter.numel() for parameter in prior.parameters()),
            "weights": sum(parameter.nbytes for parameter in prior.parameters()),
            "optimizer": moments + copies,
            "checkpoint": sum(path.stat().st_size for path in (folder / str(stage)).rglob("*") if path.is_file()),
        }
    (folder / "measured.json").write_text(json.dumps(measured))


def test_states_and_checkpoint_are_those_of_the_engine(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(measure, args=(tmp_path,))
    for stage, measured in json.loads((tmp_path / "measured.json").read_text()).items():
        expected = model_state_bytes(measured["num_parameters"], int(stage), 1, largest_block=0, accumulation=1)
        assert (expected.weights, expected.optimizer) == (measured["weights"], measured["optimizer"])
        checkpoint_bytes = estimate(engine_config(int(stage)), 1, **RATES).checkpoint_bytes
        assert checkpoint_bytes == pytest.approx(measured["checkpoint"], rel=0.1)


def test_seven_billion_parameters_on_64_ranks_without_the_memory() -> None:
    config = load_config(
        [],
        [
            "root=x",
            "prior.model.preset=7b",
            "data.clip.resolution=128",
            "vqvae.model.num_codes=1024",
            "prior.training.precision=bfloat16",
            "prior.training.global_batch=512",
            "prior.training.zero_stage=3",
        ],
    )
    result = estimate(config, 64, **RATES)
    assert result.num_parameters == pytest.approx(7e9, rel=0.01)
    assert (result.rows, result.accumulation, result.tokens_per_clip) == (8, 1, 4 * 32 * 32)
    assert result.states[0].total - result.states[0].buffers == 16 * result.num_parameters
    assert result.states[3].total - result.states[3].buffers == pytest.approx(20 * result.num_parameters / 64, rel=1e-6)
    assert result.checkpointed_activations < result.activations / 5
    assert result.flops_per_token == pytest.approx(6 * 7e9, rel=0.1)
    assert 1e9 < result.tokens_per_day < 1e11
