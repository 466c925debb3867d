"""``evaluate --what vqvae``: the tokenizer by itself, as soon as it is trained."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.evaluation import evaluate
from clipmill.evaluation.distances import FeatureStatistics, frechet_distance
from clipmill.evaluation.gallery import Gallery
from clipmill.evaluation.networks import Network
from clipmill.evaluation.results import find_evaluations
from clipmill.models.export import load_vqvae
from clipmill.models.vqvae import to_input, to_pixels
from clipmill.shards.manifest import Manifest
from tests.evaluation.networks import TinyI3D, TinyLPIPS, save
from tests.evaluation.toy_run import (
    CLASSES,
    NUM_CLIPS,
    Unleased,
    clip_pixels,
    metrics_of,
    toy_config,
    write_run_up_to_tokenizer,
    write_tokenizer,
)

NUM_FRAMES = 9
MODELS: dict[str, dict[str, Any]] = {
    "ema": {"downsample": (1, 4, 4)},
    "codebooks": {"downsample": (1, 4, 4), "num_codebooks": 4},
    "causal": {"causal": True, "norm": "group"},
    "fsq": {"downsample": (1, 4, 4), "quantizer": "fsq", "fsq_levels": (4, 4)},
    "lfq": {"downsample": (1, 4, 4), "quantizer": "lfq"},
    "causal-lfq-codebooks": {"causal": True, "norm": "group", "quantizer": "lfq", "num_codebooks": 2},
}


def tokenizer_config(root: Path, model: str = "ema", **settings: object) -> RunConfig:
    config = toy_config(root, num_frames=NUM_FRAMES)
    vqvae = config.vqvae.model_copy(update={"model": config.vqvae.model.model_copy(update=MODELS[model])})
    judged = config.evaluate.model_copy(update={"what": "vqvae", **settings})
    return config.model_copy(update={"vqvae": vqvae, "evaluate": judged})


@pytest.fixture
def trained(tmp_path: Path) -> RunConfig:
    """A run that has come as far as ``train-vqvae``."""
    config = tokenizer_config(tmp_path / "run")
    write_run_up_to_tokenizer(config, tmp_path / "scratch")
    return config


def run(config: RunConfig) -> dict[str, Any]:
    evaluate.run(config, Unleased(evaluate.folder_url(config), 1))
    return metrics_of(config)


def real_clips() -> np.ndarray:
    return np.stack([clip_pixels("val", number, NUM_FRAMES) for number in range(NUM_CLIPS["val"])])


def through_tokenizer(config: RunConfig, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and uint8 reconstructions, in the batches of the stage: others round a few pixels otherwise."""
    tokenizer, _, _ = load_vqvae(config.folder("vqvae"))
    codes, copies = [], []
    with torch.inference_mode():
        for part in np.array_split(clips, [3, 6]):
            codes.append(tokenizer.encode(to_input(torch.from_numpy(part))))
            copies.append(to_pixels(tokenizer.decode(codes[-1])))
    return torch.cat(codes).numpy(), torch.cat(copies).numpy()


@pytest.mark.parametrize("model", MODELS)
def test_any_tokenizer_is_judged_by_the_whole_split(model: str, tmp_path: Path):
    config = tokenizer_config(tmp_path / "run", model)
    write_run_up_to_tokenizer(config, tmp_path / "scratch")
    result, real = run(config), real_clips()
    codes, copies = through_tokenizer(config, real)
    errors = np.square(real / 255 - copies / 255).mean(axis=(1, 2, 3, 4))
    scores = result["reconstruction"]
    assert scores["num_clips"] == result["clips"]["num_clips_in_split"] == 7
    assert scores["mse"] == pytest.approx(errors.mean(), rel=1e-3)
    assert scores["nmse"] == pytest.approx(scores["mse"] / (real / 255).var(), rel=1e-9)
    assert scores["psnr_db"] == pytest.approx(-10 * math.log10(scores["mse"]), rel=1e-9)
    assert 0 < scores["ssim"] < 1

    num_codebooks = config.vqvae.model.num_codebooks
    columns = codes.reshape(-1, num_codebooks)
    counts = [np.bincount(columns[:, book], minlength=16) for book in range(num_codebooks)]
    entropies = [-sum(n / count.sum() * math.log2(n / count.sum()) for n in count if n) for count in counts]
    book = result["codebook"]
    assert (book["num_codes"], book["num_codebooks"]) == (16, num_codebooks)
    assert book["used_share"] == pytest.approx(np.mean([(count > 0).mean() for count in counts]))
    assert book["entropy_bits"] == pytest.approx(np.mean(entropies))
    assert book["perplexity"] == pytest.approx(np.mean([2**entropy for entropy in entropies]))
    positions = codes[0].size // num_codebooks
    assert book["bits_per_clip"] == pytest.approx(positions * sum(entropies))
    assert book["raw_bits_per_clip"] == 4 * positions * num_codebooks

    order = np.argsort(errors, kind="stable")
    assert [clip["key"] for clip in result["extremes"]["worst"]] == [f"{n:016x}_000000" for n in order[::-1][:4]]
    assert [clip["key"] for clip in result["extremes"]["best"]] == [f"{n:016x}_000000" for n in order[:4]]
    gallery = Gallery.load(evaluate.folder_url(config) + "/gallery.npz")
    assert np.array_equal(gallery.rows["real"], real)
    assert gallery.labels == tuple(CLASSES[number % 3] for number in range(7))


def test_it_needs_clips_and_tokenizer_only_and_says_what_it_measured(trained: RunConfig):
    assert sorted(path.name for path in Path(trained.root).iterdir()) == ["clips", "vqvae"]
    assert not evaluate.is_finished(trained)
    result = run(trained)
    assert evaluate.is_finished(trained)
    assert result["inputs"]["tokenizer"] == load_vqvae(trained.folder("vqvae"))[2]
    assert result["inputs"]["clips"] == Manifest.load(trained.folder("clips", "val"), "clips").fingerprint
    assert result["steps"] == {"tokenizer": 8}
    assert result["clips"] == {
        "split": "val",
        "num_clips": 7,
        "num_clips_in_split": 7,
        "num_frames": NUM_FRAMES,
        "resolution": [12, 16],
        "fps_lowest": 8,
        "fps_highest": 8,
        "fit": "crop",
    }
    assert result["fvd"] is None
    assert result["reconstruction"]["lpips"] is None
    with pytest.raises(UserError, match="run `clipmill tokenize`"):  # all of it cannot be judged yet
        evaluate.is_finished(tokenizer_config(Path(trained.root), what="all"))


def test_a_tokenizer_that_was_trained_on_is_judged_again(trained: RunConfig):
    before = run(trained)
    torch.manual_seed(3)
    write_tokenizer(trained, Manifest.load(trained.folder("clips", "train"), "clips"), step=16)
    assert not evaluate.is_finished(trained)
    after = run(trained)
    assert evaluate.is_finished(trained)
    assert before["inputs"]["tokenizer"] != after["inputs"]["tokenizer"]
    assert before["reconstruction"]["mse"] != after["reconstruction"]["mse"]
    found = find_evaluations(trained.root)
    assert {one.name: one.metrics for one in found} == {"vqvae-8": before, "vqvae-16": after}


def test_networks_measure_what_they_are_given_for(trained: RunConfig, tmp_path: Path):
    files = {
        "fvd_weights": save(TinyI3D(), tmp_path / "i3d.pt"),
        "lpips_weights": save(TinyLPIPS(), tmp_path / "lpips.pt"),
    }
    config = tokenizer_config(Path(trained.root), **files)
    assert not evaluate.is_finished(config)
    result = run(config)
    assert evaluate.is_finished(config)
    real = real_clips()
    _, copies = through_tokenizer(config, real)
    i3d = Network("fvd_weights", files["fvd_weights"], torch.device("cpu"))
    sets = [FeatureStatistics.of(i3d.features(videos)) for videos in (real, copies)]
    assert result["fvd"]["rfvd"] == pytest.approx(frechet_distance(*sets), rel=1e-3)
    assert (result["fvd"]["num_real"], result["fvd"]["is_singular"]) == (7, True)
    # Frames in [-1, 1] are twice as far apart as in [0, 1].
    assert result["reconstruction"]["lpips"] == pytest.approx(4 * result["reconstruction"]["mse"], rel=1e-5)
    (tmp_path / "elsewhere").mkdir()
    moved = {key: shutil.copy(path, tmp_path / "elsewhere") for key, path in files.items()}
    assert evaluate.is_finished(tokenizer_config(Path(trained.root), **moved))
    save(torch.nn.Flatten(), Path(files["lpips_weights"]))  # another network under the same name
    with pytest.raises(UserError, match=r"holds another evaluation: evaluate\.weights_sha256\.lpips"):
        evaluate.is_finished(config)


def test_few_clips_make_a_warning(trained: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run(tokenizer_config(Path(trained.root), fvd_weights=save(TinyI3D(), tmp_path / "i3d.pt")))
    assert "400 channels (real 7), so the covariance is singular" in caplog.text


def without_clips(config: RunConfig) -> RunConfig:
    shutil.rmtree(Path(config.root, "clips"))
    return config


def without_tokenizer(config: RunConfig) -> RunConfig:
    shutil.rmtree(Path(config.root, "vqvae"))
    return config


def without_weights(config: RunConfig) -> RunConfig:
    return tokenizer_config(Path(config.root), fvd_weights="absent.pt")


def with_one_clip(config: RunConfig) -> RunConfig:
    return tokenizer_config(Path(config.root), fvd_weights="absent.pt", max_clips=1)


def on_other_clips(config: RunConfig) -> RunConfig:
    shorter = toy_config(Path(config.root + "-shorter"))
    write_run_up_to_tokenizer(shorter, Path(config.root).parent / "shorter")
    shutil.rmtree(Path(config.root, "clips"))
    shutil.copytree(Path(shorter.root, "clips"), Path(config.root, "clips"))
    return config


def on_short_clips(config: RunConfig) -> RunConfig:
    on_other_clips(config)
    return tokenizer_config(Path(config.root), fvd_weights="absent.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_clips, "no clips at .*run `clipmill shard`"),
        (without_tokenizer, "no tokenizer at .*run `clipmill train-vqvae`"),
        (without_weights, r"evaluate\.fvd_weights absent\.pt does not exist"),
        (with_one_clip, r"at least 2 clips .*evaluate\.max_clips"),
        (on_other_clips, "was trained on clips with num_frames=9, .* have num_frames=8"),
        (on_short_clips, r"at least 9 frames, .* have 8; .*evaluate\.fvd_weights"),
    ],
)
def test_what_the_user_can_fix_is_said(trained: RunConfig, change: Callable[[RunConfig], RunConfig], message: str):
    config = change(trained)
    for ask in (evaluate.is_finished, run):
        with pytest.raises(UserError, match=message):
            ask(config)
    assert not Path(config.root, "evaluation").exists()


def test_the_command_prints_a_table_and_ends_with_the_summary(trained: RunConfig, tmp_path: Path):
    keys = ("data.clip.num_frames=9", "data.clip.resolution=[12,16]", f"root={trained.root}", "evaluate.batch_size=3")
    command = [sys.executable, "-m", "clipmill.cli", "evaluate", "--what", "vqvae", *keys]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *table, summary = result.stdout.splitlines()
    numbers = metrics_of(tokenizer_config(Path(trained.root)))
    text = " ".join(" ".join(table).split())
    for shown in (
        "7 clips of the split val",
        "LPIPS",
        "evaluate.fvd_weights",
        f"{numbers['reconstruction']['ssim']:.4g}",
    ):
        assert shown in text
    assert json.loads(summary)["psnr_db"] == numbers["reconstruction"]["psnr_db"]
