from __future__ import annotations

import math
import shutil
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.evaluation import evaluate
from clipmill.evaluation.baselines import CodeTables, baseline_scores
from clipmill.evaluation.distances import FeatureStatistics, frechet_distance, inception_score
from clipmill.evaluation.gallery import Gallery, clips_per_class
from clipmill.evaluation.networks import Network
from clipmill.evaluation.results import find_evaluations, read_evaluation
from clipmill.evaluation.table import circumstances, fvd_rows
from clipmill.models.export import load_prior
from clipmill.models.vqvae import to_input, to_pixels
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes
from clipmill.shards.manifest import Manifest
from tests.evaluation.networks import TinyC3D, TinyI3D, TinyLPIPS, save
from tests.evaluation.toy_run import (
    CLASSES,
    NUM_CLIPS,
    Unleased,
    clip_pixels,
    make_samples,
    metrics_of,
    toy_config,
    write_prior,
    write_run,
    write_tokenizer,
    write_tokens,
)


def run(config: RunConfig) -> dict[str, Any]:
    return evaluate.run(config, Unleased(evaluate.folder_url(config), 1))


def asking(config: RunConfig, **settings: object) -> RunConfig:
    """The same run with other settings of ``evaluate``."""
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=settings)})


def without_schema(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "schema"}


def val_codes(config: RunConfig) -> np.ndarray:
    return codes_of(config, "val")


def codes_of(config: RunConfig, split: str) -> np.ndarray:
    tokens = ShardDataset(Manifest.load(config.folder("tokens", split), "tokens"), decode_codes)
    return np.stack([tokens[index]["codes"] for index in range(len(tokens))], dtype=np.int64)


def test_a_prior_over_two_codebooks_is_sampled_and_judged(tmp_path: Path):
    config = toy_config(tmp_path / "run", format="npy")
    model = config.vqvae.model.model_copy(update={"num_codebooks": 2})
    config = config.model_copy(update={"vqvae": config.vqvae.model_copy(update={"model": model})})
    write_run(config, tmp_path / "scratch")
    make_samples(config)
    run(config)
    metrics = metrics_of(config)
    codes = val_codes(config)
    assert codes.shape == (NUM_CLIPS["val"], 2, 3, 4, 2)
    assert metrics["codebook"]["num_codebooks"] == 2
    assert metrics["prior"]["bits_per_clip"] == pytest.approx(metrics["prior"]["bits_per_token"] * codes[0].size)
    prior, tokenizer, _, _ = load_prior(config.folder("prior"))
    with torch.inference_mode():
        label = torch.tensor([number % 3 for number in range(len(codes))])
        nats = prior.loss(torch.from_numpy(codes), label).mean().item()
    assert metrics["prior"]["val_nats_per_token"] == pytest.approx(nats, rel=1e-5)
    # A sample's pixels are what its codes decode to.
    made = ShardDataset(Manifest.load(config.folder("samples", "default"), "samples"), decode_codes)[0]
    pixels = ShardDataset(Manifest.load(config.folder("samples", "default"), "samples"), decode_clip)[0]["video"]
    with torch.inference_mode():
        decoded = to_pixels(tokenizer.decode(torch.from_numpy(made["codes"].astype(np.int64))[None]))[0]
    assert made["codes"].shape == (2, 3, 4, 2)
    assert np.abs(decoded.numpy().astype(int) - pixels.astype(int)).max() <= 1


def test_reconstruction_is_measured_on_every_val_clip(config: RunConfig):
    _, tokenizer, _, _ = load_prior(config.folder("prior"))
    clips = np.stack([clip_pixels("val", number) for number in range(NUM_CLIPS["val"])])
    with torch.inference_mode():
        copies = to_pixels(tokenizer.decode(tokenizer.encode(to_input(torch.from_numpy(clips))))).numpy()
    numbers = metrics_of(config)["reconstruction"]
    assert numbers["num_clips"] == 7
    # Another batch size rounds a few pixels otherwise.
    assert numbers["mse"] == pytest.approx(np.mean((clips / 255 - copies / 255) ** 2), rel=1e-3)
    assert numbers["nmse"] == pytest.approx(numbers["mse"] / (clips / 255).var(), rel=1e-9)


def test_the_prior_is_measured_on_every_val_token_without_dropout(config: RunConfig):
    prior, _, _, _ = load_prior(config.folder("prior"))
    codes = torch.from_numpy(val_codes(config))
    labels = torch.tensor([number % 3 for number in range(7)])
    with torch.inference_mode():
        log_probabilities = prior(codes, labels).log_softmax(-1)
    expected = -log_probabilities.gather(-1, codes.reshape(7, -1, 1)).mean().item()
    numbers = metrics_of(config)["prior"]
    assert prior.training is False
    assert config.prior.model.dropout > 0
    assert numbers["val_nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert numbers["bits_per_token"] == pytest.approx(expected / math.log(2), rel=1e-5)
    assert numbers["bits_per_clip"] == pytest.approx(24 * expected / math.log(2), rel=1e-5)
    assert numbers["bits_per_dim"] == pytest.approx(numbers["bits_per_clip"] / (8 * 12 * 16 * 3), rel=1e-9)
    assert numbers["ratio_to_unigram"] == pytest.approx(expected / numbers["unigram_nats"], rel=1e-5)
    assert (numbers["num_clips"], numbers["num_clips_behind_tables"]) == (7, 9)


def test_codebook_and_samples_are_counted(config: RunConfig):
    metrics = metrics_of(config)
    codes = val_codes(config)
    assert metrics["codebook"]["num_used"] == len(np.unique(codes))
    counts = np.bincount(codes.reshape(-1), minlength=16)
    assert metrics["codebook"]["sorted_counts"] == sorted(counts.tolist(), reverse=True)

    manifest = Manifest.load(config.folder("samples", "default"), "samples")
    dataset = ShardDataset(manifest, decode_clip)
    pixels = np.stack([dataset[index]["video"] for index in range(5)]) / 255
    samples = metrics["samples"]
    appearance = samples["appearance"]
    assert samples["count"] == 5
    assert samples["per_class"] == {"down": 2, "left": 2, "up": 1}
    assert appearance["other"]["pixel_variance"] == pytest.approx(pixels.var(), rel=1e-9)
    real = np.stack([clip_pixels("val", number) for number in range(7)]) / 255
    change = np.abs(np.diff(pixels, axis=1)).mean() / np.abs(np.diff(real, axis=1)).mean()
    assert appearance["ratio"]["frame_change"] == pytest.approx(change, rel=1e-9)
    tokens = ShardDataset(manifest, decode_codes)
    made = np.bincount(np.stack([tokens[index]["codes"] for index in range(5)]).reshape(-1), minlength=16)
    distance = np.abs(made / made.sum() - counts / counts.sum()).sum() / 2
    assert samples["code_total_variation"] == pytest.approx(distance, rel=1e-9)


def test_the_gallery_holds_the_clips_that_were_scored(config: RunConfig):
    gallery = Gallery.load(config.folder("evaluation", "default", "gallery.npz"))
    assert gallery.labels == tuple(CLASSES[number % 3] for number in range(7))
    assert np.array_equal(gallery.rows["real"], np.stack([clip_pixels("val", number) for number in range(7)]))
    error = np.mean((gallery.rows["real"] / 255 - gallery.rows["reconstruction"] / 255) ** 2)
    assert error == pytest.approx(metrics_of(config)["reconstruction"]["mse"], rel=1e-9)


def test_clips_per_class_shows_all_of_few_and_some_of_many():
    assert clips_per_class([]) == {None: 24}
    assert clips_per_class(["a", "b", "c", "d", "e"]) == dict.fromkeys("abcde", 4)
    assert set(clips_per_class([f"{number:03d}" for number in range(101)]).values()) == {3}
    assert len(clips_per_class([f"{number:03d}" for number in range(101)])) == 12


def test_an_evaluation_says_what_it_measured_and_is_never_overwritten(config: RunConfig):
    assert evaluate.is_finished(config)
    metrics = metrics_of(config)
    assert metrics["inputs"]["clips"] == Manifest.load(config.folder("clips", "val"), "clips").fingerprint
    assert metrics["inputs"]["val_tokens"] == Manifest.load(config.folder("tokens", "val"), "tokens").fingerprint
    assert (metrics["settings"]["what"], metrics["settings"]["max_clips"]) == ("all", None)
    fewer = asking(config, max_clips=4, max_train_clips=5)
    for ask in (evaluate.is_finished, run):
        with pytest.raises(UserError, match=r"evaluate\.max_clips \(None -> 4\), .*choose another evaluate\.name"):
            ask(fewer)
    fewer = asking(config, max_clips=4, max_train_clips=5, name="few")
    assert not evaluate.is_finished(fewer)
    run(fewer)
    numbers = metrics_of(fewer)
    assert (numbers["clips"]["num_clips"], numbers["clips"]["num_clips_in_split"]) == (4, 7)
    assert numbers["reconstruction"]["num_clips"] == numbers["prior"]["num_clips"] == numbers["samples"]["count"] == 4
    assert numbers["prior"]["num_clips_behind_tables"] == 5
    assert evaluate.is_finished(config)
    assert metrics_of(config) == metrics


def test_more_samples_are_another_question(config: RunConfig):
    before = metrics_of(config)
    more = config.model_copy(update={"sample": config.sample.model_copy(update={"num_samples": 6})})
    make_samples(more)
    with pytest.raises(UserError, match=r"holds another evaluation: samples \('.{8}' -> '.{8}'\)"):
        evaluate.is_finished(more)
    run(asking(more, name="six"))
    assert [one.name for one in find_evaluations(config.root)] == ["default", "six"]
    assert metrics_of(config) == before


def test_an_evaluation_says_when_and_where_it_was_made(config: RunConfig):
    found = read_evaluation(config.folder("evaluation", "default"))
    assert found is not None
    age = datetime.now(UTC) - datetime.fromisoformat(found.made["at"])
    assert timedelta(0) <= age < timedelta(hours=1)
    assert found.made["host"] == socket.gethostname()
    assert found.made["versions"]["torch"] == torch.__version__
    (hardware,) = found.made["hardware"]
    assert torch.backends.cpu.get_cpu_capability() in hardware
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert found.made["commit"].removesuffix("+changes") == head


def test_a_limited_evaluation_reads_the_same_clips_for_every_number(config: RunConfig):
    for split, num_videos in (("val", 2), ("train", 1)):  # of its 7 and 9 clips
        for kind in ("clips", "tokens"):
            url = config.folder(kind, split, "manifest.json")
            document = storage.read_document(url, 99)
            schema = document.pop("schema")
            document["facts"]["num_videos"] = num_videos
            storage.publish_document(url, document, schema)
    config = asking(config, max_clips=4, max_train_clips=4, name="few")
    run(config)
    spread = [0, 1, 3, 5]
    gallery = Gallery.load(config.folder("evaluation", "few", "gallery.npz"))
    assert np.array_equal(gallery.rows["real"], np.stack([clip_pixels("val", number) for number in spread]))
    metrics = metrics_of(config)
    assert circumstances(metrics).startswith("4 of 7 clips of the split val")
    prior, _, _, _ = load_prior(config.folder("prior"))
    codes, labels = torch.from_numpy(val_codes(config)[spread]), torch.tensor([number % 3 for number in spread])
    with torch.inference_mode():
        nats = prior.loss(codes, labels).mean().item()
    assert metrics["prior"]["val_nats_per_token"] == pytest.approx(nats, rel=1e-5)
    train, val = CodeTables(16), CodeTables(16)
    train.update(codes_of(config, "train")[[0, 2, 4, 6]])
    val.update(codes.numpy())
    assert baseline_scores(train, val).items() <= metrics["prior"].items()


def test_numbers_of_an_older_clipmill_are_measured_again(config: RunConfig):
    url = config.folder("evaluation", "default", "metrics.json")
    document = storage.read_document(url, 99)
    storage.publish_document(url, without_schema(document), document["schema"] - 1)
    assert not evaluate.is_finished(config)
    run(config)
    assert storage.read_document(url, 99) == document


@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_running_again_gives_the_same_numbers_whatever_parts_are_left(config: RunConfig, kept: str):
    folder = Path(config.root, "evaluation")
    before = [(folder / "default" / name).read_bytes() for name in ("metrics.json", "gallery.npz")]
    shutil.rmtree(folder / "default")
    if kept == "none":
        shutil.rmtree(folder / "_parts")
    elif kept == "some":
        for part in sorted((folder / "_parts").rglob("*.npz"))[::2]:
            part.unlink()
    assert not evaluate.is_finished(config)
    run(config)
    after = [(folder / "default" / name).read_bytes() for name in ("metrics.json", "gallery.npz")]
    assert after == before


def test_a_damaged_part_is_named(config: RunConfig):
    folder = Path(config.root, "evaluation")
    shutil.rmtree(folder / "default")
    part = next((folder / "_parts").glob("samples-*/*.npz"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{part.name} is damaged; remove it"):
        run(config)


def test_the_tokenizer_is_judged_by_the_same_code_as_alone(config: RunConfig):
    alone = asking(config, what="vqvae")
    assert not evaluate.is_finished(alone)
    run(alone)
    assert evaluate.folder_url(alone).endswith("/vqvae-8")  # named by the tokenizer's step
    metrics, result = metrics_of(config), metrics_of(alone)
    for section in ("clips", "reconstruction", "codebook", "extremes"):
        assert result[section] == metrics[section]


def test_all_three_distances_and_the_inception_score(tmp_path: Path):
    config = toy_config(tmp_path / "run", num_frames=16)
    write_run(config, tmp_path / "scratch")
    make_samples(config)
    files = {
        "fvd_weights": save(TinyI3D(), tmp_path / "i3d.pt"),
        "is_weights": save(TinyC3D(), tmp_path / "c3d.pt"),
        "lpips_weights": save(TinyLPIPS(), tmp_path / "lpips.pt"),
    }
    config = asking(config, **files)
    run(config)
    assert evaluate.is_finished(config)
    metrics = metrics_of(config)

    samples = ShardDataset(Manifest.load(config.folder("samples", "default"), "samples"), decode_clip)
    gallery = Gallery.load(config.folder("evaluation", "default", "gallery.npz"))  # all seven clips
    made = np.stack([samples[index]["video"] for index in range(5)])
    networks = {key: Network(key, path, torch.device("cpu")) for key, path in files.items()}
    real, copies, sampled = (
        FeatureStatistics.of(networks["fvd_weights"].features(videos))
        for videos in (gallery.rows["real"], gallery.rows["reconstruction"], made)
    )
    fvd = metrics["fvd"]
    assert fvd["rfvd"] == pytest.approx(frechet_distance(real, copies), rel=1e-4)  # other batches round otherwise
    assert fvd["fvd"] == pytest.approx(frechet_distance(real, sampled), rel=1e-4)
    assert fvd["fvd_star"] == pytest.approx(frechet_distance(copies, sampled), rel=1e-4)
    assert (fvd["num_real"], fvd["num_samples"], fvd["is_singular"]) == (7, 5, True)
    score = inception_score(networks["is_weights"].probabilities(made))
    assert metrics["samples"]["inception_score"] == pytest.approx(score)
    assert score["mean"] > 1
    rows = {name: (value, about) for name, value, about in fvd_rows(metrics)}
    for name, key in (("rFVD", "rfvd"), ("FVD", "fvd"), ("FVD*", "fvd_star")):
        assert rows[name][0] == f"{fvd[key]:.4g}"
    assert "5 samples" in rows["FVD"][1]
    assert "16 frames of 12 x 16 pixels (height x width) at 8 fps, fitted by crop" in circumstances(metrics)
    save(torch.nn.Flatten(), tmp_path / "c3d.pt")  # another network under the same name
    with pytest.raises(UserError, match=r"evaluate\.weights_sha256\.is \("):
        evaluate.is_finished(config)


def test_the_inception_score_is_of_sixteen_frames(config: RunConfig):
    with pytest.raises(UserError, match=r"clips of 16 frames, .* have 8; leave evaluate\.is_weights out"):
        evaluate.is_finished(asking(config, is_weights="absent.pt"))


@pytest.mark.parametrize("what", ["vqvae", "all"])
def test_a_driver_without_the_gpu_is_told_so(config: RunConfig, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.rmtree(Path(config.root, "evaluation"))
    on_gpu = config.model_copy(update={"cluster": config.cluster.model_copy(update={"use_gpu": True})})
    with pytest.raises(UserError, match=r"cluster\.use_gpu=true, but .* finds no GPU"):
        run(asking(on_gpu, what=what))
    assert not Path(config.root, "evaluation").exists()


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("clips/val", "shard"),
        ("tokens/train", "tokenize"),
        ("tokens/val", "tokenize"),
        ("prior/exports", "train-prior"),
        ("samples/default", "sample"),
    ],
)
def test_a_missing_stage_is_named(config: RunConfig, missing: str, stage: str):
    shutil.rmtree(Path(config.root, missing))
    shutil.rmtree(Path(config.root, "evaluation"))
    for ask in (evaluate.is_finished, run):
        with pytest.raises(UserError, match=rf"run `clipmill {stage}`"):
            ask(config)
    assert not Path(config.root, "evaluation").exists()


def test_tokens_of_another_tokenizer_are_refused(config: RunConfig, tmp_path: Path):
    other = toy_config(tmp_path / "other")
    shutil.copytree(Path(config.root, "clips"), Path(other.root, "clips"))
    clips = {split: Manifest.load(other.folder("clips", split), "clips") for split in NUM_CLIPS}
    torch.manual_seed(5)
    write_tokenizer(other, clips["train"])
    for split, manifest in clips.items():
        write_tokens(other, manifest, tmp_path / "scratch" / split)
    shutil.rmtree(Path(config.root, "tokens"))
    shutil.copytree(Path(other.root, "tokens"), Path(config.root, "tokens"))
    with pytest.raises(UserError, match="was trained on tokens of"):
        evaluate.is_finished(config)


def test_tokens_without_what_the_prior_is_told_are_refused(tmp_path: Path):
    config = toy_config(tmp_path / "run")
    model = config.prior.model.model_copy(update={"condition": "actions", "style": "modern"})
    config = config.model_copy(update={"prior": config.prior.model_copy(update={"model": model})})
    write_run(config, tmp_path / "scratch")
    make_samples(config)
    assert not evaluate.is_finished(config)
    shutil.rmtree(Path(config.root, "tokens", "val"))
    clips = Manifest.load(config.folder("clips", "val"), "clips")
    write_tokens(config, clips, tmp_path / "other", num_actions=4)
    message = (
        r"needs actions of shape \[8, 2\]; of the 7 clips at .*tokens/val 7 have it, with shapes \[\[4, 2\]\]; remove"
    )
    for ask in (evaluate.is_finished, run):
        with pytest.raises(UserError, match=message):
            ask(config)


def test_samples_of_another_prior_are_refused(config: RunConfig):
    torch.manual_seed(6)
    write_prior(config, Manifest.load(config.folder("tokens", "train"), "tokens"))
    with pytest.raises(UserError, match=r"made by prior .*sample\.name"):
        evaluate.is_finished(config)
