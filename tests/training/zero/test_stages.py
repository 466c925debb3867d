"""What holds at every ZeRO stage, with the optimizer offloaded or not, on two ranks: averages, bad steps, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipmill.config import TrainingConfig
from clipmill.training.world import World, join_world
from clipmill.training.zero.conversion import WholeTensors
from clipmill.training.zero.engine import TAG, Engine, whole_state
from tests.models.processes import run_ranks

LAYOUTS = [(0, False), (1, False), (2, False), (3, False), (1, True), (3, True)]
"""(ZeRO stage, offload)."""
ROWS, DIM = 3, 5
WEIGHTS = [0.9, 0.5, 0.25, 0.25]
"""Of the newest weights in their average."""


class Objective(nn.Module):
    """A regression whose buffer follows its inputs, as batch statistics do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(DIM, 4), nn.Tanh(), nn.Linear(4, 1))
        self.register_buffer("seen", torch.zeros(DIM))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            self.seen.lerp_(batch["x"].detach().mean(0), 0.5)
        return (self.model(batch["x"]).squeeze(1) - batch["y"]).square().mean(), {}


def batch_of(step: int, rank: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(ROWS, DIM, generator=random)
    return {"x": x, "y": x.sum(1), "weight": torch.ones(ROWS)}


def config_of(stage: int, offload: bool, **settings: Any) -> TrainingConfig:
    keys = {"global_batch": 2 * ROWS, "lr": 0.05, "grad_clip": 0.5, **settings}
    return TrainingConfig.model_validate({"zero_stage": stage, "offload": offload, "weights_ema": 0.9, **keys})


def train(engine: Engine, steps: range, spoilt: int | None = None) -> list[float]:
    """Norms of the gradients; the spoilt step's batch has a NaN on rank 1."""
    norms = []
    for step in steps:
        batch = batch_of(step, engine.world.rank)
        if step == spoilt and engine.world.rank == 1:
            batch["x"][0, 0] = torch.nan
        with engine.step(lr=0.05, average_weight=WEIGHTS[step]):
            engine.micro_step(batch)
        norms.append(engine.grad_norm.item())
    return norms


def saved(engine: Engine, folder: Path, stage: int) -> dict[str, dict[str, Tensor]]:
    """Weights, moments and averages of the engine, whole, by way of a checkpoint; and its buffers."""
    engine.save(folder)
    engine.world.barrier()
    whole = WholeTensors(folder / TAG, stage)
    parts = {part: {name: whole.read(name, part) for name in whole.shapes} for part in ("weights", *whole.moments)}
    return {**parts, "buffers": {name: value.clone() for name, value in whole.buffers.items()}}


def equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[part][name], b[part][name]) for part in a for name in a[part])


def keep_averages(world: World, folder: Path) -> dict[Any, dict[str, Any]]:
    results = {}
    for number, (stage, offload) in enumerate(LAYOUTS):
        own = folder / str(number)
        engine = Engine(Objective(), config_of(stage, offload), world, ROWS, 1)
        norms = train(engine, range(3))
        before = saved(engine, own / "before", stage)
        with engine.averaged():
            loss_of_average = engine.evaluate(batch_of(99, 0))[0].item()
        unchanged = equal(before, saved(engine, own / "after", stage))
        train(engine, range(3, 4))
        undisturbed = saved(engine, own / "undisturbed", stage)

        resumed = Engine(Objective(), config_of(stage, offload), world, ROWS, 1)
        resumed.load(own / "before")
        train(resumed, range(3, 4))
        converted = Engine(Objective(), config_of(*LAYOUTS[number - 1]), world, ROWS, 1)
        converted.load_converted(own / "before", stage)
        train(converted, range(3, 4))
        results[stage, offload] = {
            "norms": norms,
            "average": before["average"] | before["buffers"],
            "exported": {name: value.read() for name, value in whole_state(own / "before", stage).items()},
            "loss_of_average": loss_of_average,
            "unchanged": unchanged,
            "resumed": equal(undisturbed, saved(resumed, own / "resumed", stage)),
            "converted": (saved(converted, own / "converted", LAYOUTS[number - 1][0]), undisturbed),
        }
    return results


def reference() -> tuple[list[float], dict[str, Tensor], float]:
    """The same three steps by torch alone: norms, averages, and their loss."""
    objective, averages = Objective(), {}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.05, weight_decay=0.0)
    norms = []
    for step in range(3):
        both = [batch_of(step, rank) for rank in range(2)]
        loss = objective({name: torch.cat([batch[name] for batch in both]) for name in both[0]})[0]
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(objective.parameters(), 0.5).item())
        optimizer.step()
        for name, value in objective.named_parameters():
            averages[name] = averages.get(name, value.detach()).lerp(value.detach(), WEIGHTS[step])
    objective.load_state_dict(averages, strict=False)
    return norms, averages, objective.eval()(batch_of(99, 0))[0].item()


def leave_out_spike(world: World, folder: Path, stage: int) -> tuple[bool, bool]:
    """Whether a spike left no trace, buffers and averages included; and a step like the others one."""
    engine = Engine(Objective(), config_of(stage, False, bad_steps="skip", spike_factor=100.0), world, ROWS, 1)
    train(engine, range(1))
    before = saved(engine, folder / "before", stage)
    engine.usual_norm = [engine.grad_norm.item() / 1000, 20.0]
    train(engine, range(1, 2))
    untouched = equal(before, saved(engine, folder / "after", stage))
    engine.usual_norm = [engine.grad_norm.item(), 20.0]
    train(engine, range(2, 3))
    return untouched, not equal(before, saved(engine, folder / "next", stage))


def leave_out(world: World, folder: Path) -> dict[Any, dict[str, Any]]:
    results = {}
    for number, (stage, offload) in enumerate(LAYOUTS):
        own = folder / str(number)
        engine = Engine(Objective(), config_of(stage, offload, bad_steps="skip"), world, ROWS, 1)
        train(engine, range(1))
        before = saved(engine, own / "before", stage)
        norms = train(engine, range(1, 2), spoilt=1)
        untouched = equal(before, saved(engine, own / "after", stage))
        results[stage, offload] = {"norms": norms, "untouched": untouched, "next": train(engine, range(2, 3))}
        if stage < 3 and not offload:
            results[stage, offload]["spike"] = leave_out_spike(world, own / "spike", stage)
    engine = Engine(Objective(), config_of(0, False, precision="bfloat16"), world, ROWS, 2)
    products: set[torch.dtype] = set()
    engine.objective.model[0].register_forward_hook(lambda _, __, output: products.add(output.dtype))
    engine.micro_step(batch_of(0, world.rank))
    engine.evaluate(batch_of(0, world.rank))
    results["dtypes"] = {
        "products": products,
        "gradients": {
            parameter.grad.dtype for parameter in engine.objective.parameters() if parameter.grad is not None
        },
        "weights": {parameter.dtype for parameter in engine.objective.parameters()},
        "sums": engine.deepspeed.get_data_types()[1],
    }
    return results


def both(rank: int, world_size: int, folder: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    world = join_world()
    return keep_averages(world, folder / "averages"), leave_out(world, folder / "bad")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """One start of two processes for all of it: that takes longer than the steps."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(both, 2, folder, folder)


def test_averages_follow_the_weights_and_travel_with_them(by_rank: list[Any]) -> None:
    norms, averages, loss = reference()
    for results, _ in by_rank:
        for layout, result in results.items():
            assert result["norms"] == pytest.approx(norms, rel=1e-5), layout
            assert result["loss_of_average"] == pytest.approx(loss, rel=1e-5), layout
            for name, average in averages.items():
                torch.testing.assert_close(result["average"][name], average, rtol=1e-5, atol=1e-6)
                assert torch.equal(result["exported"][name], result["average"][name]), (layout, name)
            assert torch.equal(result["exported"]["seen"], result["average"]["averages.seen"]), layout
            assert not torch.equal(result["exported"]["seen"], result["average"]["seen"]), layout
            assert result["exported"].keys() == averages.keys() | {"seen"}
            assert result["unchanged"], f"{layout}: to look at the average changed the training"
            assert result["resumed"], f"{layout}: a resumed training is another one"
            for part, values in result["converted"][0].items():
                for name, value in values.items():
                    torch.testing.assert_close(value, result["converted"][1][part][name], rtol=1e-5, atol=1e-6)


def test_a_step_with_a_nan_is_skipped_by_all_ranks(by_rank: list[Any]) -> None:
    for _, results in by_rank:
        dtypes = results.pop("dtypes")
        assert dtypes.pop("products") == {torch.bfloat16}
        assert dtypes == {"gradients": {torch.float32}, "weights": {torch.float32}, "sums": torch.float32}
        for layout, result in results.items():
            assert not torch.tensor(result["norms"]).isfinite().any(), layout
            assert result["untouched"], f"{layout}: the bad step left a trace"
            assert torch.tensor(result["next"]).isfinite().all(), layout
            assert result.get("spike", (True, True)) == (True, True), layout
