"""Trainings that start from the weights of an export."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clipmill.config import TrainingConfig, VQVAEModelConfig, load_config
from clipmill.errors import UserError
from clipmill.models.export import load_prior, load_vqvae, save_export
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.training import prior as prior_stage
from clipmill.training import vqvae as vqvae_stage
from clipmill.training.initial import initial_facts, initialise
from tests.models.test_prior import stirred
from tests.training.processes import run
from tests.training.toy import stage_command

SIZES = {"hidden_dim": 8, "num_res_layers": 1, "embedding_dim": 4, "num_codes": 16, "downsample": (1, 2, 2)}
WORLD: Any = SimpleNamespace(rank=0, from_rank_zero=lambda make: make())


@pytest.fixture
def exported(tmp_path: Path) -> str:
    """A tokenizer whose codebook has learned."""
    torch.manual_seed(0)
    model = VQVAE(VQVAEModelConfig.model_validate(SIZES), 0.08)
    model.quantizer.initialised.fill_(True)
    model.quantizer.counts.fill_(3)
    body = {"kind": "vqvae", "model": model.config.model_dump(mode="json"), "pixel_variance": 0.08}
    save_export(str(tmp_path / "tokenizer"), model, body)
    return str(tmp_path / "tokenizer")


def started(exported: str, folder: Path, **keys: Any) -> tuple[VQVAE, VQVAE, VQVAE, list[str]]:
    """A new model with these keys: as it was and as it began; the export; and what was not taken."""
    config = load_config([], ["root=x"])
    model_config = VQVAEModelConfig.model_validate(SIZES | keys)
    config = config.model_copy(update={"vqvae": config.vqvae.model_copy(update={"model": model_config})})
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(VQVAE(model_config, 0.08))
    training = TrainingConfig(init_from=exported)
    initialise(models[1], training, str(folder), WORLD, lambda url: vqvae_stage._source(config, url))
    facts = initial_facts(str(folder))
    assert facts["weights_taken"] + sum(line.startswith("new") for line in facts["weights_not_taken"]) == len(
        models[1].state_dict()
    )
    return models[0], models[1], load_vqvae(exported)[0], facts["weights_not_taken"]


def test_an_equal_model_begins_as_the_export(exported: str, tmp_path: Path) -> None:
    _, began, source, left = started(exported, tmp_path / "run")
    assert left == []
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in began.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "fresh", "message"),
    [
        ({"num_codes": 32}, {"quantizer"}, "quantizer.codebook: (16, 4) in the export, (32, 4) here"),
        ({"num_codebooks": 2}, {"quantizer"}, "quantizer.codebook: the export has another num_codebooks"),
        ({"distance": "cosine"}, {"quantizer"}, "quantizer.sums: the export has another distance"),
        (
            {"quantizer": "fsq", "fsq_levels": (4, 4), "embedding_dim": 256},
            {"to_latent", "from_latent"},
            "to_latent.bias: (4,) in the export, (2,) here",
        ),
        ({"num_res_layers": 2}, {"encoder.stack", "decoder.stack"}, "the export has no such weight"),
        ({"hidden_dim": 16}, {"encoder", "decoder", "to_latent", "from_latent"}, "(8,) in the export, (16,) here"),
    ],
)
def test_what_fits_is_taken_and_the_rest_is_named(
    exported: str, tmp_path: Path, keys: dict[str, Any], fresh: set[str], message: str
) -> None:
    was, began, source, left = started(exported, tmp_path / "run", **keys)
    named = {line.split(": ")[1] for line in left if line.startswith("new: ")}
    assert any(message in line for line in left)
    for name, tensor in began.state_dict().items():
        expected = was if name in named else source
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert named
    assert all(name.startswith(tuple(fresh)) for name in named)
    if "quantizer" in fresh:  # a codebook is taken with its counts, or learns from its first batch
        assert not began.quantizer.initialised


def test_what_a_new_quantizer_leaves_is_named(exported: str, tmp_path: Path) -> None:
    *_, left = started(exported, tmp_path / "run", quantizer="lfq")
    assert "unused: quantizer.codebook" in left


def test_an_export_of_another_kind_is_refused(exported: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an export of a vqvae, not of a prior"):
        load_prior(exported)
    with pytest.raises(UserError, match="no tokenizer at"):
        started(str(tmp_path / "nothing"), tmp_path / "run")
    with pytest.raises(ValueError, match="init_from and a URL in resume exclude each other"):
        TrainingConfig(init_from="a", resume="runs/b")


def begin_prior(model: Prior, folder: Path, tokenizer: str, classes: list[str], **other: Any) -> list[str]:
    """Starts a prior from an export of this model and 3 classes; what was not taken."""
    source = stirred(num_classes=3)
    codes = VQVAE(VQVAEModelConfig.model_validate(SIZES), 0.08)
    body = {
        "kind": "prior",
        "model": source.config.model_dump(mode="json"),
        "latent_shape": list(source.latent_shape),
        "num_codes": source.num_codes,
        "num_classes": 3,
        "classes": ["a", "b", "c"],
        "tokenizer": {"sha8": "same", "model": codes.config.model_dump(mode="json"), "pixel_variance": 0.08},
    }
    save_export(str(folder / "source"), source, body, tokenizer=codes)
    inputs: Any = SimpleNamespace(tokenizer_body={"sha8": tokenizer}, classes=classes)
    codebook = model.input.codebook.clone()
    training = TrainingConfig(init_from=str(folder / "source"))
    initialise(model, training, str(folder / "run"), WORLD, lambda url: prior_stage._source(inputs, url))
    assert torch.equal(model.input.codebook, codebook)
    return initial_facts(str(folder / "run"))["weights_not_taken"]


def test_a_prior_takes_codes_and_classes_of_the_same_meaning_alone(tmp_path: Path) -> None:
    same = begin_prior(stirred(num_classes=3), tmp_path / "same", "same", ["a", "b", "c"])
    assert same == ["new: input.codebook: that of the tokens' tokenizer"]
    others = begin_prior(stirred(num_classes=3), tmp_path / "others", "another", ["x", "y", "z"])
    assert "new: head.weight: the export has another tokenizer" in others
    assert "new: norms.table: the export has other classes" in others
    longer = begin_prior(stirred(num_classes=3, shape=(4, 3, 4)), tmp_path / "longer", "same", ["a", "b", "c"])
    assert "new: input.axes.0: (2, 8) in the export, (4, 8) here" in longer


def test_a_training_starts_once_and_then_resumes(workspace: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "run", tmp_path / "log.txt"
    settings = [f"vqvae.training.init_from={workspace / 'tokenizer'}", "vqvae.model.num_codes=32"]
    run(stage_command(workspace, root, "train-vqvae", 1, *settings, "vqvae.training.steps=2"), log, 1)
    summary = json.loads((root / "vqvae" / "summary.json").read_text())
    assert summary["weights_taken"] > 0
    assert any("quantizer.codebook" in line for line in summary["weights_not_taken"])
    log.unlink()
    (root / "vqvae" / "initial.json").unlink()
    run(stage_command(workspace, root, "train-vqvae", 1, *settings, "vqvae.training.steps=4"), log, 1)
    assert not (root / "vqvae" / "initial.json").exists()
