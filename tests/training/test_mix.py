"""Training on a mix of several runs' data, and on crops: what is refused, and that a resume goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clipmill import storage
from clipmill.config import RunConfig, load_config
from clipmill.errors import UserError
from clipmill.metrics import read_metrics
from clipmill.models.export import read_latest
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import SCHEMA, Manifest
from clipmill.training import prior, vqvae
from tests.evaluation.toy_run import toy_config, write_run
from tests.training.processes import start

WEIGHTS = (3, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs whose tokens are of one tokenizer: the pixels are the same, the classes are not."""
    folders = [tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("run")]
    for number, folder in enumerate(folders):
        write_run(toy_config(folder), tmp_path_factory.mktemp("scratch"))
        change(folder, "clips", lambda document, mean=number / 10: document["facts"].update(pixel_mean=mean))
    change(folders[1], "tokens", lambda document: document["facts"].update(classes=["down", "left", "sideways", "up"]))
    return folders


def change(root: Path, kind: str, edit: Any) -> None:
    """Edits the manifests of a run, whose fingerprints leave the facts out."""
    for split in ("train", "val"):
        url = str(root / kind / split / "manifest.json")
        document = storage.read_document(url, SCHEMA)
        document.pop("schema")
        edit(document)
        storage.publish_document(url, document, SCHEMA)


def settings(root: Path, runs: list[Path], weights: tuple[float, ...] = WEIGHTS, **training: Any) -> dict[str, Any]:
    values = toy_config(root).model_dump(mode="json")
    values["data"]["mix"] = [{"url": str(run), "weight": weight} for run, weight in zip(runs, weights, strict=True)]
    values["tokenize"]["tokenizer"] = str(runs[0] / "vqvae")
    for stage in ("vqvae", "prior"):
        shared = {"global_batch": 8, "loader_workers": 0, "log_every": 1, "val_every": 4, "val_clips": 6}
        values[stage]["training"] |= shared
    values["vqvae"]["training"] |= training
    values["cluster"]["training_launcher"] = "process"
    return values


def config(root: Path, runs: list[Path], *arguments: Any, **training: Any) -> RunConfig:
    return RunConfig.model_validate(settings(root, runs, *arguments, **training))


def test_the_parts_of_a_mix_and_their_shares_are_the_training_s_identity(runs: list[Path], tmp_path: Path) -> None:
    mixed = config(tmp_path, runs)
    tokens, clips = prior._tokens(mixed), vqvae._clips(mixed)
    fingerprints = [Manifest.load(str(run / "tokens" / "train")).fingerprint for run in runs]
    identity = prior._identity(mixed, tokens)
    assert identity["tokens"] == [f"750/1000 {fingerprints[0]}", f"250/1000 {fingerprints[1]}"]
    other_weights = config(tmp_path, runs, (1, 1))
    assert prior._identity(other_weights, tokens) != identity
    assert vqvae._identity(other_weights, clips) != vqvae._identity(mixed, clips)
    alone = toy_config(runs[0])
    assert prior._identity(alone, prior._tokens(alone))["tokens"] == fingerprints[0]


def test_the_pixel_variance_of_a_mix_is_that_of_all_its_pixels(runs: list[Path], tmp_path: Path) -> None:
    mixed = config(tmp_path, runs)
    random = np.random.default_rng(0)
    pixels = [random.normal(mean, 0.08**0.5, share * 100_000) for mean, share in ((0.0, 3), (0.1, 1))]
    expected = np.var(np.concatenate(pixels))
    assert vqvae._pixel_variance(mixed, vqvae._clips(mixed)) == pytest.approx(expected, rel=0.01)


def test_parts_that_do_not_fit_are_refused_in_one_line(runs: list[Path], tmp_path: Path) -> None:
    def refuse(mixed: RunConfig, stage: Any, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            stage.is_finished(mixed)
        assert "\n" not in str(caught.value)

    refuse(
        config(tmp_path, [runs[0], tmp_path / "absent"]), prior, r"no tokens at .*absent.*for that run first, or corr"
    )
    refuse(config(tmp_path, runs, (10_000, 1)), vqvae, r"weight 1 of .* is less than a thousandth of all")
    other = tmp_path / "other"
    write_run(toy_config(other), tmp_path / "scratch")
    change(other, "tokens", lambda document: document["facts"].update(classes=[]))
    refuse(config(tmp_path, [runs[0], other]), prior, r"tokens at .*other/tokens/train have no classes")
    url = storage.join(str(other), "clips", "train", "manifest.json")
    recipe = storage.read_document(url, SCHEMA)["recipe"]
    write_clips_of(other, {**recipe, "clip": {**recipe["clip"], "resolution": 32}})
    refuse(
        config(tmp_path, [runs[0], other]),
        vqvae,
        r"data\.mix: the clips at .* have resolution=\[12, 16\], those at .* 32",
    )
    for crop in (16, [16, 12]):
        message = r"random_crop=.* is larger than the clips at .*, whose resolution is \[12, 16\]; choose"
        refuse(config(tmp_path, runs, random_crop=crop), vqvae, message)
    with pytest.raises(UserError, match=r"random_crop 10 must be a multiple of the height and width \(4, 4\)"):
        load_config([], ["root=x", "vqvae.training.random_crop=10"])


def write_clips_of(root: Path, recipe: dict[str, Any]) -> None:
    """The training clips once more, as if they were of another recipe."""
    manifest = Manifest.load(str(root / "clips" / "train"))
    freeze(manifest.url, "clips", [0], recipe, manifest.facts)


def run(values: dict[str, Any], stage: str, folder: Path, *assignments: str) -> tuple[int, str]:
    """Status and output of the stage as one process."""
    folder.mkdir(exist_ok=True)
    (path := folder / "run.yaml").write_text(yaml.safe_dump(values))
    log = folder / "log.txt"
    status = start([stage, "--config", str(path), *assignments], num_ranks=1, log=log).wait(timeout=240)
    return status, log.read_text()


def losses(root: Path, stage: str, split: str) -> dict[int, float]:
    return {each["step"]: each["loss"] for each in read_metrics(str(root / stage)) if each["split"] == split}


@pytest.mark.slow
@pytest.mark.ci
def test_a_prior_of_a_mix_knows_all_classes_and_refuses_other_shares(runs: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    status, output = run(settings(root, runs), "train-prior", tmp_path, "prior.training.steps=2")
    assert status == 0, output[-3000:]
    latest = read_latest(str(root / "prior"))
    assert latest is not None
    assert latest[0]["classes"] == ["down", "left", "sideways", "up"]
    more = "prior.training.steps=4"
    status, output = run(settings(root, runs, (1, 1)), "train-prior", tmp_path, more)
    assert status == 2
    assert "tokens (['750/1000 " in output.splitlines()[-1]
    assert "--accept-new-dataset" in output.splitlines()[-1]
    status, output = run(settings(root, runs, (1, 1)), "train-prior", tmp_path, more, "--accept-new-dataset")
    assert status == 0, output[-3000:]
    assert list(losses(root, "prior", "train")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_tokenizer_of_crops_of_a_mix_resumes_exactly(runs: list[Path], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training = {"random_crop": [8, 12], "hflip": True, "schedule": "constant"}
    for root, steps in ((whole, 6), (parts, 3), (parts, 6)):
        values = settings(root, runs, **training)
        status, output = run(values, "train-vqvae", tmp_path, f"vqvae.training.steps={steps}")
        assert status == 0, output[-3000:]
    assert losses(whole, "vqvae", "train") == losses(parts, "vqvae", "train")
    assert losses(whole, "vqvae", "val")[6] == losses(parts, "vqvae", "val")[6]
    plain = tmp_path / "plain"
    run(settings(plain, runs, schedule="constant"), "train-vqvae", tmp_path, "vqvae.training.steps=3")
    assert losses(plain, "vqvae", "train")[1] != losses(parts, "vqvae", "train")[1]
    latest = read_latest(str(whole / "vqvae"))
    assert latest is not None
    assert latest[0]["latent_shape"] == [2, 3, 4]  # of whole clips
