from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import webdataset

from clipmill import storage
from clipmill.cluster import connect
from clipmill.config import ClusterConfig, RunConfig, SampleConfig
from clipmill.errors import UserError
from clipmill.models.export import load_prior, save_export
from clipmill.models.vqvae import to_pixels
from clipmill.pipeline.inspect import inspect
from clipmill.sampling import sample
from clipmill.sampling.generate import generate
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes
from clipmill.shards.format import parse_npy
from clipmill.shards.manifest import Manifest
from clipmill.video import decode_mp4
from tests.evaluation.toy_run import (
    CLASSES,
    Unleased,
    make_samples,
    toy_config,
    write_prior,
    write_run,
    write_tokens,
)


@pytest.fixture
def _embedded_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connect(ClusterConfig(num_cpus=2)):
        yield


@pytest.fixture(scope="module")
def prior_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds a prior and nothing else: no data set, no tokenizer folder."""
    whole = tmp_path_factory.mktemp("whole")
    write_run(toy_config(whole), tmp_path_factory.mktemp("scratch"))
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(whole / "prior", alone / "prior")
    return alone


@pytest.fixture
def root(prior_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(prior_root, tmp_path / "run")
    return tmp_path / "run"


def run(config: RunConfig) -> dict:
    return sample.run(config, Unleased(sample.folder_url(config), 1))


def shard_bytes(config: RunConfig) -> dict[str, bytes]:
    url = sample.folder_url(config)
    return {
        shard.name: storage.read_bytes(storage.join(url, shard.name)) for shard in Manifest.load(url, "samples").shards
    }


def members(config: RunConfig) -> list[dict[str, bytes]]:
    """All bytes of all samples, in order."""

    def take(content: dict[str, memoryview]) -> dict[str, bytes]:
        return {name: bytes(data) for name, data in content.items()}

    return list(ShardDataset(Manifest.load(sample.folder_url(config), "samples"), take))


@pytest.mark.usefixtures("_embedded_ray")
def test_samples_are_what_the_prior_alone_makes(root: Path):
    config = toy_config(root)
    assert not sample.is_finished(config)
    summary = run(config)
    assert sample.is_finished(config)
    assert summary["samples"] == 5  # of two batches of 3, one is dropped

    manifest = Manifest.load(sample.folder_url(config), "samples")
    _, tokenizer, _, sha8 = load_prior(config.folder("prior"))
    assert manifest.recipe["prior"] == sha8
    clips, codes = ShardDataset(manifest, decode_clip), ShardDataset(manifest, decode_codes)
    assert len(clips) == 5
    for index in range(5):
        made, code = clips[index], codes[index]["codes"]
        assert made["key"] == f"{index:016x}_000000"
        assert made["label"] == CLASSES[index % 3]
        assert (made["meta"]["index"], made["meta"]["seed"], made["meta"]["prior"]) == (index, 0, sha8)
        with torch.inference_mode():
            decoded = to_pixels(tokenizer.decode(torch.from_numpy(code)[None]))[0].numpy()
        assert np.abs(decoded.astype(int) - made["video"]).mean() < 4  # h264 at crf 10 of a noise-like picture
    assert not np.array_equal(codes[0]["codes"], codes[3]["codes"])  # same class, other noise
    here = toy_config(root, name="here")
    make_samples(here)
    assert shard_bytes(here) == shard_bytes(config)  # whichever process makes them, and under any name


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a worker finds its GPU")
def test_a_worker_without_the_gpu_that_ray_promised_ends_the_stage_in_one_line(root: Path):
    cluster = ClusterConfig(use_gpu=True)
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100 * 2**20)
    try:
        with pytest.raises(UserError, match=r"cluster\.use_gpu=true, but .* finds no GPU") as caught:
            run(toy_config(root).model_copy(update={"cluster": cluster}))
    finally:
        ray.shutdown()
    assert "\n" not in str(caught.value)
    assert not (root / "samples").exists()


def test_plain_webdataset_reads_samples(root: Path):
    config = toy_config(root)
    make_samples(config)
    folder = Path(sample.folder_url(config))
    urls = [str(folder / name) for name in (folder / "shards.txt").read_text().split()]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [item["json"]["index"] for item in read] == list(range(5))
    assert set(read[0]) >= {"mp4", "codes.npy", "json"}
    assert read[0]["codes.npy"].shape == (2, 3, 4)


def test_a_killed_run_ends_byte_identical(root: Path):
    killed = toy_config(root)
    make_samples(killed)
    folder = Path(sample.folder_url(killed))
    expected = shard_bytes(killed)
    fingerprint = Manifest.load(str(folder), "samples").fingerprint
    # What is on disk after a SIGKILL between the objects of unit 3 and its commit record:
    (folder / "manifest.json").unlink()
    (folder / "commits" / "000003.json").unlink()
    next(folder.glob("samples-000003-*.tar")).write_bytes(b"")
    make_samples(killed)
    assert shard_bytes(killed) == expected
    assert Manifest.load(str(folder), "samples").fingerprint == fingerprint


def test_more_samples_leave_the_first_ones_alone(root: Path):
    few, many = toy_config(root), toy_config(root, num_samples=8)
    make_samples(few)
    before = shard_bytes(few)
    commit = Path(sample.folder_url(few), "commits", "000000.json")
    written = commit.stat().st_mtime_ns
    assert not sample.is_finished(many)
    make_samples(many)
    assert Manifest.load(sample.folder_url(many), "samples").num_samples == 8
    after = shard_bytes(many)
    assert before.items() < after.items()
    assert commit.stat().st_mtime_ns == written
    assert sample.is_finished(few)
    assert run(few)["samples"] == 8  # asking for fewer drops none
    at_once = toy_config(root, num_samples=8, name="at-once")
    make_samples(at_once)
    assert members(at_once) == members(many)  # each sample, however many were asked for at first


def test_lossless_samples_are_the_decoded_codes(root: Path):
    config = toy_config(root, format="npy")
    make_samples(config)
    _, tokenizer, _, _ = load_prior(config.folder("prior"))
    for sample_members in members(config):
        codes = parse_npy(sample_members["codes.npy"])
        with torch.inference_mode():
            decoded = to_pixels(tokenizer.decode(torch.from_numpy(codes.astype(np.int64))[None]))[0].numpy()
        # another batch size rounds otherwise
        assert np.abs(decoded.astype(int) - parse_npy(sample_members["npy"])).max() <= 1


def test_the_preview_shows_the_samples_and_follows_them(root: Path, caplog: pytest.LogCaptureFixture):
    config = toy_config(root)
    with caplog.at_level("INFO"):
        make_samples(config)
    folder = Path(sample.folder_url(config), "preview")
    assert f"{folder}/grid.mp4; next: `clipmill evaluate`" in caplog.text
    names = {"grid.mp4", "grid.png", "class-down.mp4", "class-left.mp4", "class-up.mp4"}
    assert {path.name for path in folder.iterdir()} == names
    grid = decode_mp4((folder / "grid.mp4").read_bytes())
    assert grid.shape == (8, 2 * 132 + 4, 3 * 176 + 2 * 4, 3)  # 12 x 16 pixels eleven times as large, in two rows
    assert grid[:, 140:, 2 * 180 :].min() > 250  # the place of a sixth sample is empty
    before = (folder / "grid.mp4").read_bytes()
    (folder / "grid.png").unlink()
    assert not sample.is_finished(config)  # killed in the midst of it
    make_samples(toy_config(root, num_samples=6))
    assert (folder / "grid.png").exists()
    assert (folder / "grid.mp4").read_bytes() != before
    assert sample.is_finished(config)


def test_a_video_of_odd_size_is_no_mp4(tmp_path: Path):
    body = {"classes": [], "tokenizer": {"clip": {"clip": {"num_frames": 4, "resolution": [5, 8]}}}}
    with pytest.raises(UserError, match=r"5 x 8 pixels cannot be sample\.format=mp4 .*set sample\.format=npy"):
        sample.check_settings(SampleConfig(), body)


def test_chosen_classes_come_in_turn(root: Path):
    config = toy_config(root, classes=["up", "down"])
    make_samples(config)
    dataset = ShardDataset(Manifest.load(sample.folder_url(config), "samples"), decode_clip)
    assert [dataset[index]["label"] for index in range(5)] == ["up", "down", "up", "down", "up"]


def test_a_prior_without_classes(tmp_path: Path):
    config = toy_config(tmp_path / "run")
    model = config.prior.model.model_copy(update={"class_conditional": False})
    config = config.model_copy(update={"prior": config.prior.model_copy(update={"model": model})})
    write_run(config, tmp_path / "scratch")
    make_samples(config)
    dataset = ShardDataset(Manifest.load(sample.folder_url(config), "samples"), decode_clip)
    assert [dataset[index]["label"] for index in range(5)] == [None] * 5
    asking = config.model_copy(update={"sample": config.sample.model_copy(update={"classes": ["up"], "name": "b"})})
    with pytest.raises(UserError, match="without classes"):
        run(asking)


def with_model(config: RunConfig, **keys: object) -> RunConfig:
    model = type(config.prior.model).model_validate({**config.prior.model.model_dump(), **keys})
    return config.model_copy(update={"prior": config.prior.model_copy(update={"model": model})})


def test_conditions_and_first_latents_come_from_clips(tmp_path: Path):
    keys = {"condition": "actions", "style": "modern", "label_dropout": 0.1}
    config = with_model(toy_config(tmp_path / "run", prefix_latents=1, guidance=1.5), **keys)
    write_run(config, tmp_path / "scratch")
    make_samples(config)
    tokens = ShardDataset(Manifest.load(config.folder("tokens", "val"), "tokens"), decode_codes)
    manifest = Manifest.load(sample.folder_url(config), "samples")
    samples = ShardDataset(manifest, lambda members: {**decode_clip(members), **decode_codes(members)})
    for index in range(5):
        made, given = samples[index], tokens[index]
        assert made["meta"]["given"] == given["key"]
        assert made["label"] == given["label"]
        assert np.array_equal(made["codes"][:1], given["codes"][:1])
        assert not np.array_equal(made["codes"], given["codes"])
    assert manifest.recipe["given"] == tokens.manifest.fingerprint

    prior, _, body, _ = load_prior(config.folder("prior"))
    clips = [tokens[index] for index in range(3)]
    codes = generate(
        prior,
        seed=0,
        indices=[0, 1, 2],
        labels=torch.tensor([body["classes"].index(clip["label"]) for clip in clips]),
        condition=torch.from_numpy(np.stack([clip["actions"] for clip in clips])),
        prefix=torch.from_numpy(np.stack([clip["codes"][:1] for clip in clips], dtype=np.int64)),
        guidance=1.5,
    )
    assert np.array_equal(codes.numpy(), np.stack([samples[index]["codes"] for index in range(3)]))


def test_conditions_of_another_shape_are_refused(tmp_path: Path):
    config = with_model(toy_config(tmp_path / "run"), condition="actions", style="modern")
    write_run(config, tmp_path / "scratch")
    assert not sample.is_finished(config)
    shutil.rmtree(Path(config.root, "tokens", "val"))
    write_tokens(config, Manifest.load(config.folder("clips", "val"), "clips"), tmp_path / "other", num_actions=4)
    with pytest.raises(
        UserError, match=r"actions of shape \[8, 2\]; .*shapes \[\[4, 2\]\]; set sample\.given to others"
    ):
        sample.is_finished(config)


def test_missing_conditions_are_refused_before_anything_is_written(root: Path, tmp_path: Path):
    for change, message in (
        (
            {"guidance": 2.0},
            r"sample.guidance=2.0 needs a prior trained with .*label_dropout or condition_dropout",
        ),
        ({"prefix_latents": 2}, "has 2 latent frames, at least one must be generated"),
        ({"prefix_latents": 1}, r"no tokens at .*/tokens/val to take conditions or first latents from"),
    ):
        with pytest.raises(UserError, match=message):
            sample.is_finished(toy_config(root, **change))
    assert not (root / "samples").exists()


def test_mistakes_are_refused_before_anything_is_written(root: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no prior at .*clipmill train-prior"):
        sample.is_finished(toy_config(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists()
    with pytest.raises(UserError, match=r"sideways: the prior knows down, left, up"):
        run(toy_config(root, classes=["up", "sideways"]))
    assert not (root / "samples").exists()


def test_an_export_that_is_no_prior_of_this_clipmill_is_refused_before_anything_is_written(root: Path, tmp_path: Path):
    prior, tokenizer, body, _ = load_prior(str(root / "prior"))
    newer, other = ({name: each[name] for name in each.keys() - {"sha8"}} for each in (body, body["tokenizer"]))
    newer["model"] = newer["model"] | {"window": 8}
    save_export(str(tmp_path / "newer" / "prior"), prior, newer, tokenizer)
    save_export(str(tmp_path / "other" / "prior"), tokenizer, other)
    for name, message in (
        ("newer", r"the prior of exports/\w{8} has settings .*model\.window"),
        ("other", r"other/prior/exports/\w{8} is an export of a vqvae, not of a prior"),
    ):
        for ask in (sample.is_finished, run):
            with pytest.raises(UserError, match=message):
                ask(toy_config(tmp_path / name))
        assert not (tmp_path / name / "samples").exists()


def test_samples_with_the_noise_of_an_older_clipmill_are_refused_by_name(root: Path):
    config = toy_config(root)
    make_samples(config)
    record = Path(sample.folder_url(config), "commits", "000000.json")
    document = json.loads(record.read_text())
    del document["recipe"]["schema"]
    record.write_text(json.dumps(document))
    for ask in (sample.is_finished, run):
        with pytest.raises(UserError, match=r"samples/\w+ have recipe schema 1, .* another sample\.name"):
            ask(config)


CHANGES = [{"temperature": [1.0, 0.5]}, {"seed": 1}, {"batch_size": 2}, {"min_p": 0.1}, {"format": "npy"}]


def with_sample(config: RunConfig, **keys: object) -> RunConfig:
    return config.model_copy(update={"sample": config.sample.model_copy(update=keys)})


def test_samples_longer_than_the_window(root: Path, caplog: pytest.LogCaptureFixture):
    config = with_sample(toy_config(root, format="npy"), num_frames=24)
    make_samples(config)
    manifest = Manifest.load(sample.folder_url(config), "samples")
    settings = manifest.recipe["sample"]
    assert (settings["num_frames"], settings["overlap_latents"]) == (24, 1)
    assert manifest.facts["latent_shape"][0] == 6
    prior, _, _, _ = load_prior(config.folder("prior"))
    for each in members(config):
        codes, about = parse_npy(each["codes.npy"]), json.loads(bytes(each["json"]))
        assert (parse_npy(each["npy"]).shape[0], codes.shape[0], about["num_frames"]) == (24, 6, 24)
    label = torch.tensor([CLASSES.index(about["label"])])
    window = torch.from_numpy(codes[None, 4:6].astype(np.int64))
    again = generate(prior, seed=0, indices=[4], labels=label, prefix=window[:, :1], first_frame=4)
    assert torch.equal(again, window)  # of the last sample, the last window
    assert sample.is_finished(config)
    with pytest.raises(UserError, match=r"sample\.num_frames .*another sample\.name"):
        sample.is_finished(with_sample(config, num_frames=28))


def test_lengths_that_the_prior_does_not_make_are_refused(root: Path):
    with pytest.raises(UserError, match="num_frames=10: this prior makes 8 frames, or more in steps of 4"):
        sample.is_finished(with_sample(toy_config(root), num_frames=10))
    with pytest.raises(
        UserError, match="has 2 latent frames, at least one must be generated, and a clip has 2; set it to at most 1"
    ):
        sample.is_finished(with_sample(toy_config(root), prefix_latents=2))
    assert not (root / "samples").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_need_another_name(root: Path, change: dict):
    make_samples(toy_config(root, num_samples=3))
    before = sorted(path for path in root.rglob("*"))
    for ask in (sample.is_finished, run):
        with pytest.raises(UserError, match=rf"sample\.{next(iter(change))} .*another sample\.name"):
            ask(toy_config(root, **change))
    assert sorted(path for path in root.rglob("*")) == before


def test_another_prior_needs_another_name(tmp_path: Path):
    whole = toy_config(tmp_path / "whole")
    write_run(whole, tmp_path / "scratch")
    make_samples(whole)
    write_prior(whole, Manifest.load(whole.folder("tokens", "train"), "tokens"))
    with pytest.raises(UserError, match=r"prior .*another sample\.name"):
        sample.is_finished(whole)


def test_inspect_shows_samples(root: Path):
    config = toy_config(root)
    make_samples(config)
    described = inspect(sample.folder_url(config))
    assert (described["samples"], described["recipe"]["sample"]["format"]) == (5, "mp4")
    assert described["contact_sheet"].startswith(b"\x89PNG")
