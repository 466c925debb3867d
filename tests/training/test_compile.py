"""Compiled and eager training are the same training: real compilers, on the CPU."""

from __future__ import annotations

import shutil

import pytest

from tests.training.processes import run
from tests.training.toy import EXACT, read_losses, stage_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"),
]


@pytest.mark.parametrize(
    ("stage", "num_ranks", "more"),
    [
        ("train-prior", 1, []),
        ("train-prior", 1, ["prior.model.style=modern", "prior.model.checkpointed_share=0.5"]),
        ("train-vqvae", 2, []),
    ],
    ids=["videogpt", "modern", "vqvae"],
)
def test_losses_agree_with_eager_ones(workspace, tmp_path, monkeypatch, stage, num_ranks, more):
    section = stage.removeprefix("train-")
    built, losses = tmp_path / "built", []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(built))
    for compiled in ("false", "true"):
        settings = [*EXACT, *more, f"{section}.training.steps=8", f"{section}.training.compile={compiled}"]
        root = tmp_path / compiled
        run(stage_command(workspace, root, stage, 1, *settings), tmp_path / "log.txt", num_ranks)
        losses.append(read_losses(root / section))
        assert bool(list(built.rglob("*.so"))) == (compiled == "true")
    assert list(losses[0]) == list(range(1, 9))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
