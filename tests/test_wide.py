"""The quick start in 16:9 (``configs/demo-wide.yaml``) through all stages, at toy size."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

from clipmill import stages
from clipmill.config import RunConfig, load_config
from clipmill.demo import generate, video_size
from clipmill.evaluation.film import Film, Row
from clipmill.models.export import load_prior
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes
from clipmill.shards.manifest import Manifest

CONFIGS = Path(__file__).parents[1] / "configs"
HEIGHT, WIDTH = 36, 64
TRAINING = {"steps": 4, "global_batch": 4, "val_every": 4, "val_clips": 4, "checkpoint_every": 4, "loader_workers": 0}
TOY = {
    "data": {"clip": {"num_frames": 8, "clip_stride": 16}, "val_fraction": 0.3},
    "vqvae": {
        "model": {"hidden_dim": 16, "num_res_layers": 1, "axial_attention": True, "embedding_dim": 8, "num_codes": 32},
        "training": {**TRAINING, "random_crop": [24, 32]},
    },
    "tokenize": {"condition_frames": 1},
    "prior": {
        "model": {"style": "modern", "hidden_dim": 32, "num_layers": 1, "num_heads": 2},
        "training": TRAINING,
    },
    "sample": {"num_samples": 5, "batch_size": 5},
    "cluster": {"num_cpus": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run in which all stages are finished."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "toy.yaml").write_text(yaml.safe_dump({"root": str(folder / "run"), **TOY}))
    config = load_config([CONFIGS / "demo.yaml", CONFIGS / "demo-wide.yaml", folder / "toy.yaml"])
    assert config.data.clip.size == (HEIGHT, WIDTH)
    generate(config.data.source.url, num_videos=15, size=video_size(config.data.clip.size))
    assert all(stages.run_all(config).values())
    return config


def test_every_stage_keeps_the_shape(run: RunConfig) -> None:
    clips = Manifest.load(run.folder("clips", "train"), "clips")
    assert clips.recipe["clip"]["resolution"] == [HEIGHT, WIDTH]
    assert ShardDataset(clips, decode_clip)[0]["video"].shape == (8, HEIGHT, WIDTH, 3)
    tokens = Manifest.load(run.folder("tokens", "train"), "tokens")
    assert tokens.recipe["latent_shape"] == [2, 9, 16]
    sample = ShardDataset(tokens, decode_codes)[0]
    assert (sample["codes"].shape, sample["frames"].shape) == ((2, 9, 16), (1, HEIGHT, WIDTH, 3))
    prior, _, _, _ = load_prior(run.folder("prior"))
    assert prior.latent_shape == (2, 9, 16)
    samples = Manifest.load(run.folder("samples", "default"), "samples")
    assert ShardDataset(samples, decode_clip)[0]["video"].shape == (8, HEIGHT, WIDTH, 3)
    metrics = json.loads(Path(run.folder("evaluation", "default", "metrics.json")).read_text())
    assert metrics["clips"]["resolution"] == [HEIGHT, WIDTH]
    per_dim = metrics["prior"]["bits_per_clip"] / metrics["prior"]["bits_per_dim"]
    assert per_dim == pytest.approx(8 * HEIGHT * WIDTH * 3)


def film_of_one() -> Film:
    film = Film.of("one", [Row("real", [np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)], [8.0], ["a"])])
    assert film is not None
    return film


def test_the_report_shows_a_ball_as_a_circle(run: RunConfig) -> None:
    page = Path(run.folder("report", "index.html")).read_text()
    assert "8 frames of 36 x 64 pixels (height x width)" in page
    shown = re.findall(
        r'<h3>(\w+)</h3>.*?data-src="data:video/mp4;base64,([^"]+)".*?aspect-ratio: (\d+) / (\d+)', page, re.DOTALL
    )
    films = {label: (int(width), int(height), base64.b64decode(data)) for label, data, width, height in shown}
    width, height, data = films["ball_bouncing"]
    with av.open(io.BytesIO(data)) as video:
        assert video.streams.video[0].sample_aspect_ratio in (None, 1)
        frame = next(video.decode(video=0)).to_ndarray(format="rgb24")
    assert frame.shape == (height, width, 3)  # the page gives the video the room of its pixels, in their proportion
    clip_width, clip_height = film_of_one().clip_size
    real = frame[:clip_height, :clip_width]  # the first clip of the first row
    ball = (real[..., 0] > 130) & (real[..., 1] < 110)
    across, down = (np.ptp(np.flatnonzero(ball.any(axis))) + 1 for axis in (0, 1))
    assert clip_height / 4 < down == pytest.approx(across, rel=0.1)
