from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipmill.cluster import connect
from clipmill.config import ClusterConfig, RunConfig, VQVAEModelConfig, identity
from clipmill.errors import UserError
from clipmill.lease import hold
from clipmill.models.export import load_vqvae, save_export
from clipmill.models.memory import largest_batch
from clipmill.models.vqvae import VQVAE, latent_shape, to_input
from clipmill.pipeline.inspect import inspect
from clipmill.shards.commits import committed_units, read_commit
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes
from clipmill.shards.format import code_dtype
from clipmill.shards.manifest import SPLITS, Manifest
from clipmill.shards.signatures import read_signatures, signature_of
from clipmill.tokenize import tokenize, unit
from clipmill.tokenize.ahead import ClipsAhead
from clipmill.tokenize.encoder import Encoder
from clipmill.tokenize.tally import Tally, pack_counts
from clipmill.training.inputs import identity_of, require_manifests
from tests.pipeline.corpus import NUM_FRAMES, RESOLUTION, facts_of, files_of, run_config, run_shard, write_corpus

TALLIES = ("train/tally", "val/tally")
"""Segments are numbered by the attempts that wrote them."""


def run(config: RunConfig) -> dict[str, Any]:
    with hold(tokenize.folder_url(config), "tokenize") as lease:
        return tokenize.run(config, lease)


def open_split(config: RunConfig, kind: Any, split: str) -> ShardDataset:
    decode = {"clips": decode_clip, "tokens": decode_codes}[kind]
    return ShardDataset(Manifest.load(config.folder(kind, split), kind), decode)


def export_tokenizer(config: RunConfig, seed: int, **clip: int) -> str:
    """A small tokenizer with random layers, as the training stage exports it."""
    torch.manual_seed(seed)
    clips = open_split(config, "clips", "train")
    recipe = clips.manifest.recipe
    model = VQVAE(config.vqvae.model, pixel_variance=0.05)
    videos = to_input(torch.from_numpy(np.stack([clips[index]["video"] for index in range(8)])))
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0  # the running statistics become those of the one batch
    with torch.no_grad():
        model(videos)
    body = {
        "kind": "vqvae",
        "model": identity(config.vqvae.model),
        "latent_shape": list(latent_shape(config.vqvae.model, NUM_FRAMES, (RESOLUTION, RESOLUTION))),
        "num_codes": config.vqvae.model.num_codes,
        "clip": {**recipe, "clip": {**recipe["clip"], **clip}},
        "pixel_variance": 0.05,
        "step": 1,
    }
    return save_export(config.folder("vqvae"), model, body)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """A sharded corpus and a tokenizer, and a Ray that stays for the tests of this module."""
    folder = tmp_path_factory.mktemp("clips")
    write_corpus(folder / "source", with_bad=False)
    for path in (folder / "source").rglob("*.mp4"):
        np.save(path.with_suffix(".actions.npy"), np.arange(40, dtype=np.float32).reshape(20, 2))
    source = {"url": str(folder / "source"), "actions_suffix": ".actions.npy"}
    config = run_config(folder / "run", folder / "source", num_workers=2, source=source)
    model = {"hidden_dim": 16, "num_res_layers": 1, "embedding_dim": 8, "num_codes": 300, "downsample": (2, 8, 8)}
    vqvae = config.vqvae.model_copy(update={"model": type(config.vqvae.model).model_validate(model)})
    config = config.model_copy(update={"vqvae": vqvae})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connect(ClusterConfig(num_cpus=2)):
            run_shard(config)
            export_tokenizer(config, seed=1)
            yield config


@pytest.fixture(scope="module")
def finished(clips: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
    assert not tokenize.is_finished(clips)
    return clips, run(clips)


@pytest.mark.parametrize("split", SPLITS)
def test_each_clip_becomes_its_codes(finished: tuple[RunConfig, dict[str, Any]], split: str) -> None:
    config, _ = finished
    torch.set_num_threads(1)
    model, _, _ = load_vqvae(config.tokenizer_url)
    videos, tokens = open_split(config, "clips", split), open_split(config, "tokens", split)
    assert len(videos) == len(tokens) > 0
    for index in range(len(videos)):
        video, codes = videos[index], tokens[index]
        assert (codes["key"], codes["label"]) == (video["key"], video["label"])
        np.testing.assert_array_equal(codes["actions"], video["actions"])
        with torch.inference_mode():
            expected = model.encode(to_input(torch.from_numpy(video["video"])[None]))[0].numpy()
        assert codes["codes"].shape == (2, 8, 8)
        # A batch may sum in another order, so a latent between two codes may fall to the other side.
        assert (codes["codes"] != expected).mean() < 0.01


def test_the_manifest_names_tokenizer_and_clips(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    clips = Manifest.load(config.folder("clips", "train"), "clips")
    tokens = Manifest.load(config.folder("tokens", "train"), "tokens")
    assert tokens.recipe == {
        "tokenizer": load_vqvae(config.tokenizer_url)[2],
        "num_codes": 300,
        "latent_shape": [2, 8, 8],
        "precision": "float32",
        "condition_frames": 0,
        "clip": clips.recipe,
    }
    assert tokens.facts["clips"] == clips.fingerprint
    assert tokens.facts["classes"] == clips.facts["classes"]
    assert sum(tokens.facts["code_counts"]) == tokens.num_samples * 2 * 8 * 8 == summary["train_tokens"]
    assert all(summary[name] > 0 for name in ("encode_seconds", "encoder_wait_seconds", "decode_seconds"))
    assert 5 < summary["train_perplexity"] <= summary["train_codes_used"] <= 300
    assert committed_units(config.folder("tokens", "train")) == committed_units(config.folder("clips", "train"))


def test_every_clip_has_a_signature(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    found = read_signatures(Manifest.load(config.folder("tokens", "train"), "tokens"))
    videos = open_split(config, "clips", "train")
    assert found.keys == [videos[index]["key"] for index in range(len(videos))]
    for index in range(len(videos)):
        np.testing.assert_array_equal(found.grey[index], signature_of(videos[index]["video"]))


def test_inspect_decodes_tokens(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    config, _ = finished
    described = inspect(config.folder("tokens", "val"))
    assert described["tokens"] == Manifest.load(config.folder("tokens", "val")).num_samples
    assert described["contact_sheet"].startswith(b"\x89PNG")
    shutil.copytree(config.folder("tokens"), tmp_path / "tokens")
    with pytest.raises(UserError, match=r"the tokenizer .* is not at"):
        inspect(str(tmp_path / "tokens" / "val"))
    (tmp_path / "tokens" / "config.yaml").write_text(json.dumps({"tokenize": {"tokenizer": config.tokenizer_url}}))
    assert inspect(str(tmp_path / "tokens" / "val")) == described


def test_both_trainings_skip_the_clips_that_a_file_names(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path
) -> None:
    """The duplicates are made by hand here; what finds them has its own tests."""
    config, _ = finished
    found = read_signatures(Manifest.load(config.folder("tokens", "train"), "tokens"))
    gone = [1, len(found.keys) - 1]
    lines = [{"key": found.keys[i], "shard": found.shards[i], "row": int(found.rows[i])} for i in gone]
    path = tmp_path / "excluded.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    excluding = config.model_copy(update={"data": config.data.model_copy(update={"exclude": str(path)})})
    for kind, decode in (("clips", decode_clip), ("tokens", decode_codes)):
        whole, left = (require_manifests(each, kind, "train")[0] for each in (config, excluding))
        assert identity_of(config, [whole]) != identity_of(excluding, [left])
        dataset = ShardDataset(left, decode)
        keys = [dataset[index]["key"] for index in range(len(dataset))]
        assert keys == [key for index, key in enumerate(found.keys) if index not in gone]
        assert require_manifests(excluding, kind, "val") == require_manifests(config, kind, "val")
    path.write_text(json.dumps(lines[0] | {"shard": "clips-000000-00-00000000.tar"}))
    with pytest.raises(UserError, match=r"no clip that .* names is in"):
        require_manifests(excluding, "clips", "train")
    assert tokenize.is_finished(excluding)


def test_codes_are_as_narrow_as_the_codebook_allows(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    manifest = Manifest.load(config.folder("tokens", "train"), "tokens")
    shard = storage_bytes(config, manifest.shards[0].name)
    assert b"'descr': '<u2'" in shard
    assert [code_dtype(num_codes).str for num_codes in (256, 257, 65_536, 65_537)] == ["|u1", "<u2", "<u2", "<u4"]


def test_codes_are_counted_for_each_codebook() -> None:
    """Two codebooks of four codes, of which each has collapsed to one."""
    codes = np.tile(np.array([0, 3], np.uint8), (2, 3, 3, 1))
    model = VQVAE(VQVAEModelConfig(hidden_dim=8, num_codes=4, embedding_dim=4, num_codebooks=2), 0.06)
    counts = Encoder(model, 4, torch.device("cpu"), "float32", 1).count(codes)
    tally = Tally("unused", 4, 2)
    facts = {"unit": 0, "parts": [], "clips": [], "versions": {}, "fields": {}, "tokenizer": "", "condition_frames": 0}
    tally.add({"num_clips": 2, "code_counts": pack_counts(counts), **facts})
    assert counts.tolist() == [18, 0, 0, 0, 0, 0, 0, 18]
    assert tally.perplexity == 1


def test_clips_come_in_stored_order_however_many_threads_decode(clips: RunConfig, tmp_path: Path) -> None:
    dataset = open_split(clips, "clips", "train")
    shards = tuple(shard.name for shard in dataset.manifest.shards)
    for num_threads in (1, 3):
        with ClipsAhead(dataset.manifest, shards, tmp_path, 5, num_threads) as ahead:
            batches = list(ahead)
            assert (ahead.wait_seconds > 0, ahead.decode_seconds > 0) == (True, True)
        assert [len(batch) for batch in batches[:-1]] == [5] * (len(batches) - 1)
        clips_read = [clip for batch in batches for clip in batch]
        assert [clip.key for clip in clips_read] == [each["key"] for each in dataset]
        for index, clip in enumerate(clips_read):
            assert np.array_equal(clip.video, dataset[index]["video"])
            assert json.loads(clip.copied["json"]) == dataset[index]["meta"]


def test_a_damaged_shard_ends_the_reading_with_its_name(clips: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "clips"
    shutil.copytree(clips.folder("clips", "train"), copy)
    manifest = Manifest.load(str(copy), "clips")
    names = tuple(shard.name for shard in manifest.shards)
    content = bytearray((copy / names[-1]).read_bytes())
    content[700] ^= 1
    (copy / names[-1]).write_bytes(content)
    with pytest.raises(UserError, match=names[-1]), ClipsAhead(manifest, names, tmp_path, 4, 1) as ahead:
        list(ahead)


def test_tokens_of_another_precision_are_not_mixed_in(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    half = config.model_copy(update={"tokenize": config.tokenize.model_copy(update={"precision": "bfloat16"})})
    with pytest.raises(UserError, match=r"made with tokenize\.precision=float32, not bfloat16; .*another root"):
        tokenize.is_finished(half)


def test_bfloat16_is_computed_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = VQVAE(VQVAEModelConfig(hidden_dim=8, num_codes=256, embedding_dim=8, num_res_layers=1), 0.06).eval()
    video = np.random.default_rng(0).integers(256, size=(16, 64, 64, 3), dtype=np.uint8)
    seen = set()
    model.to_latent.register_forward_hook(lambda *arguments: seen.add(arguments[2].dtype))
    codes = []
    for precision in ("float32", "bfloat16"):
        encoder = Encoder(model, 256, torch.device("cpu"), precision, 1)
        codes.append(encoder.finish(encoder.start([video])))
    assert seen == {torch.float32, torch.bfloat16}
    assert (codes[0] == codes[1]).mean() > 0.5


@pytest.mark.parametrize(
    ("total", "one", "two", "batch"),
    [(100, 10, 20, 8), (100, 10, 17.7, 8), (100, 10, 11, 64), (10**9, 10, 11, 256), (10, 10, 20, 1), (100, 5, 5, 64)],
)
def test_a_batch_fills_the_memory_but_for_a_margin(total: int, one: int, two: int, batch: int) -> None:
    assert largest_batch(total, one, two) == batch


def storage_bytes(config: RunConfig, name: str) -> bytes:
    return Path(config.folder("tokens", "train", name)).read_bytes()


def test_running_again_changes_nothing_and_redoes_what_is_missing(
    finished: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, summary = finished
    assert tokenize.is_finished(config)
    folder = Path(config.folder("tokens"))
    before = files_of(folder, but=TALLIES)
    lost = folder / "train"
    (lost / "manifest.json").unlink()
    record = read_commit(str(lost), 1)
    (lost / "commits" / "000001.json").unlink()
    for part in record["parts"]:
        (lost / part["name"]).unlink()
    assert not tokenize.is_finished(config)
    assert facts_of(run(config)) == facts_of(summary)
    assert files_of(folder, but=TALLIES) == before


def test_tokenizing_goes_on_over_repaired_clips(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    tokens, clips = Path(config.folder("tokens")), Path(config.folder("clips"))
    before = files_of(tokens, but=TALLIES)
    (tokens / "train" / "manifest.json").unlink()  # a run that was killed when one unit was missing
    for part in read_commit(str(tokens / "train"), 0)["parts"]:
        (tokens / "train" / part["name"]).unlink()
    (tokens / "train" / "commits" / "000000.json").unlink()
    for part in read_commit(str(clips / "train"), 0)["parts"]:
        (clips / "train" / part["name"]).unlink()
    run_shard(config)
    assert facts_of(run(config)) == facts_of(summary)
    assert files_of(tokens, but=TALLIES) == before


def test_tokens_of_another_tokenizer_are_not_mixed_in(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    latest = Path(config.folder("vqvae", "exports", "latest.json"))
    first = json.loads(latest.read_text())["sha8"]
    document = latest.read_bytes()
    try:
        export_tokenizer(config, seed=2)
        for call in (tokenize.is_finished, run):
            with pytest.raises(UserError, match=f"holds tokens of tokenizer {first}.*remove .*choose another root"):
                call(config)
        pinned = config.tokenize.model_copy(update={"tokenizer": config.folder("vqvae", "exports", first)})
        assert tokenize.is_finished(config.model_copy(update={"tokenize": pinned}))
    finally:
        latest.write_bytes(document)


def test_tokens_of_other_clips_are_not_mixed_in(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    path = Path(config.folder("tokens", "train", "commits", "000000.json"))
    content = path.read_text()
    shutil.rmtree(config.folder("tokens", "train", "tally"))  # else records are not read again
    try:
        path.write_text(content.replace("clips-000000-00-", "clips-000000-00-f"))
        with pytest.raises(UserError, match=r"holds tokens of other clips \(unit 0\)"):
            run(config)
    finally:
        path.write_text(content)


def test_what_is_missing_or_unfit_is_named_before_anything_is_written(clips: RunConfig, tmp_path: Path) -> None:
    empty = clips.model_copy(update={"root": str(tmp_path / "run")})
    with pytest.raises(UserError, match="run `clipmill shard`"):
        tokenize.is_finished(empty)
    untrained = clips.tokenize.model_copy(update={"tokenizer": str(tmp_path / "none")})
    with pytest.raises(UserError, match="run `clipmill train-vqvae`"):
        tokenize.is_finished(clips.model_copy(update={"tokenize": untrained}))
    other = clips.model_copy(update={"root": str(tmp_path / "run")})
    Path(other.root).mkdir()
    Path(other.folder("clips")).symlink_to(clips.folder("clips"))
    export_tokenizer(other, seed=1, num_frames=8)
    with pytest.raises(UserError, match=r"num_frames=8, those at .* have num_frames=4"):
        tokenize.is_finished(other)
    assert not Path(other.folder("tokens")).exists()


def test_tokens_carry_what_a_prior_may_be_told(clips: RunConfig, tmp_path: Path) -> None:
    clips_only = Path(clips.folder("clips"))
    root = tmp_path / "run"
    root.mkdir()
    (root / "clips").symlink_to(clips_only)
    (root / "vqvae").symlink_to(Path(clips.folder("vqvae")))
    tokenizing = clips.tokenize.model_copy(update={"condition_frames": 2})
    config = clips.model_copy(update={"root": str(root), "tokenize": tokenizing})
    run(config)
    for split in SPLITS:
        videos, tokens = open_split(config, "clips", split), open_split(config, "tokens", split)
        fields = tokens.manifest.facts["fields"]
        assert fields["frames"] == {"clips": len(tokens), "shapes": [[2, RESOLUTION, RESOLUTION, 3]]}
        assert fields["actions"]["clips"] == len(tokens)
        assert "text" not in fields
        assert np.array_equal(tokens[0]["frames"], videos[0]["video"][:2])
        assert np.array_equal(tokens[0]["actions"], videos[0]["actions"])
    assert tokenize.is_finished(config)
    other = config.model_copy(update={"tokenize": clips.tokenize})
    with pytest.raises(UserError, match=r"tokens made with tokenize\.condition_frames=2, not 0"):
        tokenize.is_finished(other)


def test_the_embedding_of_a_text_is_found_by_its_hash(tmp_path: Path) -> None:
    name = hashlib.sha256(b"a red ball").hexdigest()
    np.save(tmp_path / f"{name}.npy", np.ones((3, 4), np.float16))
    found = unit._text_embedding(str(tmp_path), "a red ball")
    assert found is not None
    array = np.load(io.BytesIO(found))
    assert (array.shape, array.dtype) == ((3, 4), np.float32)
    assert unit._text_embedding(str(tmp_path), "a blue ball") is None
    assert unit._text_embedding(str(tmp_path), None) is None
    (tmp_path / f"{hashlib.sha256(b'bad').hexdigest()}.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"is no \.npy file of float \[length, channels\]"):
        unit._text_embedding(str(tmp_path), "bad")
