"""A causal tokenizer that trains on pictures and videos together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from clipmill.config import RunConfig, VQVAEModelConfig
from clipmill.errors import UserError
from clipmill.models.export import read_latest
from clipmill.models.vqvae import VQVAE, to_input
from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze
from clipmill.training import prior, vqvae
from tests.training.processes import run
from tests.training.toy import read_losses

NUM_FRAMES = 5
MODEL = {
    "hidden_dim": 8,
    "num_res_layers": 1,
    "embedding_dim": 4,
    "num_codes": 16,
    "downsample": [2, 2, 2],
    "causal": True,
    "norm": "group",
}


def model(**keys: Any) -> VQVAE:
    torch.manual_seed(0)
    made = VQVAE(VQVAEModelConfig.model_validate(MODEL | keys), 0.08)
    if made.config.quantizer == "ema":
        made.quantizer.initialised.fill_(True)
    return made


@pytest.mark.parametrize("keys", [{}, {"l1_cost": 0.5}, {"quantizer": "lfq", "num_codes": 16}, {"num_codebooks": 2}])
def test_a_picture_is_a_clip_of_one_frame(keys: dict[str, Any]) -> None:
    """Filled up to a video's length it has the loss, gradient, codes and counts that it has alone."""
    video = to_input(torch.randint(256, (2, NUM_FRAMES, 8, 8, 3), dtype=torch.uint8))
    picture = to_input(torch.randint(256, (2, 1, 8, 8, 3), dtype=torch.uint8))
    filled = torch.cat((video, picture.expand(-1, -1, NUM_FRAMES, -1, -1)))
    together, apart = model(**keys).eval(), model(**keys).eval()
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    output = together(filled, weight, torch.tensor([NUM_FRAMES, NUM_FRAMES, 1, 1]))
    videos, pictures = apart(video), apart(picture, weight[2:])
    if not keys.get("quantizer"):  # the entropy of LFQ is one of the whole batch
        expected = (2 * videos.loss + pictures.loss) / 3
        torch.testing.assert_close(output.loss, expected)
        output.loss.backward()
        expected.backward()
        ours, others = (torch.cat([each.grad.flatten() for each in made.parameters()]) for made in (together, apart))
        assert (ours - others).norm() < 1e-4 * others.norm()  # of biases before a norm it is mere rounding
    torch.testing.assert_close(
        output.metrics["recon_mse"], (2 * videos.metrics["recon_mse"] + pictures.metrics["recon_mse"]) / 3
    )
    torch.testing.assert_close(output.counts, videos.counts + pictures.counts)
    assert torch.equal(output.codes[2:, :1], pictures.codes)
    torch.testing.assert_close(output.reconstruction[2:, :, :1], pictures.reconstruction)
    assert torch.equal(output.reconstruction[2:, :, 1:], filled[2:, :, 1:])


def test_a_codebook_learns_from_the_first_frame_of_a_picture_alone() -> None:
    filled = to_input(torch.randint(256, (1, NUM_FRAMES, 8, 8, 3), dtype=torch.uint8))
    learned = []
    for rest in (filled[:, :, 1:], torch.zeros_like(filled[:, :, 1:])):
        trained = model(restart_share=0).train()
        trained(torch.cat((filled[:, :, :1], rest), 2), None, torch.tensor([1]))
        learned.append(trained.quantizer.sums)
    torch.testing.assert_close(*learned)


def write_clips(root: Path, num_frames: int, num_clips: int, side: int = 8) -> None:
    random = np.random.default_rng(num_frames)
    for split, count in (("train", num_clips), ("val", 3)):
        staging = root / f"staging-{split}"
        staging.mkdir(parents=True)
        writer = UnitWriter(staging, "clips", 0, shard_bytes=40_000)
        for index in range(count):
            pixels = random.integers(0, 256, (num_frames, side, side, 3), dtype=np.uint8)
            writer.add(Sample(f"{index:016x}_000000", {"json": json_bytes({"label": None}), "npy": npy_bytes(pixels)}))
        url = str(root / "clips" / split)
        commit_unit(url, 0, writer.finish(), {})
        facts = {"classes": [], "pixel_variance": 0.08, "pixel_mean": 0.0, "num_units": 1}
        freeze(url, "clips", [0], {"clip": {"num_frames": num_frames, "resolution": side}, "format": "npy"}, facts)


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Videos and pictures."""
    made = [tmp_path / "videos", tmp_path / "pictures"]
    write_clips(made[0], NUM_FRAMES, 9)
    write_clips(made[1], 1, 12)
    return made


def values(root: Path, roots: list[Path], steps: int = 6, **keys: Any) -> dict[str, Any]:
    training = {
        "steps": steps,
        "schedule": "constant",
        "global_batch": 4,
        "loader_workers": 0,
        "log_every": 1,
        "val_every": 3,
        "checkpoint_every": 2,
    }
    return {
        "root": str(root),
        "data": {
            "clip": {"num_frames": NUM_FRAMES, "resolution": 8},
            "format": "npy",
            "mix": [{"url": str(url), "weight": weight} for url, weight in zip(roots, (3, 1), strict=False)],
        },
        "vqvae": {"model": MODEL | keys, "training": training},
        "cluster": {"training_launcher": "process"},
    }


def train(root: Path, roots: list[Path], steps: int) -> dict[int, float]:
    root.mkdir(exist_ok=True)
    (root / "run.yaml").write_text(yaml.safe_dump(values(root, roots, steps)))
    run(["train-vqvae", "--config", str(root / "run.yaml")], root / "log.txt", 1)
    return read_losses(root / "vqvae")


def test_a_training_on_both_resumes_exactly(roots: list[Path], tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "whole", roots, 6)
    train(tmp_path / "parts", roots, 4)
    resumed = train(tmp_path / "parts", roots, 6)
    assert resumed == undisturbed
    assert len(set(resumed.values())) == len(resumed), "a loss that does not move proves nothing"
    found = read_latest(str(tmp_path / "whole" / "vqvae"))
    assert found is not None
    assert found[0]["clip"]["clip"]["num_frames"] == NUM_FRAMES
    assert found[0]["latent_shape"] == [3, 4, 4]


def test_models_that_mix_frames_or_clips_refuse_pictures(roots: list[Path], tmp_path: Path) -> None:
    for keys in ({"norm": "batch"}, {"causal": False, "downsample": [1, 2, 2]}):
        config = RunConfig.model_validate(values(tmp_path, roots, **keys))
        with pytest.raises(
            UserError, match=r"num_frames=5, those at .* 1; shard them alike.*causal=true and .*norm=group"
        ):
            vqvae.is_finished(config)


def test_the_prior_leaves_pictures_to_the_tokenizer(roots: list[Path], tmp_path: Path) -> None:
    config = RunConfig.model_validate(values(tmp_path, roots))
    assert [part.url for part in prior._without_pictures(config).data.mix] == [str(roots[0])]
    recipes = vqvae.clip_recipes(config)
    assert [recipe["clip"].get("num_frames") for recipe in recipes.values()] == [NUM_FRAMES, None]
