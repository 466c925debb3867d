import numpy as np
import pytest
import torch

from clipmill import storage
from clipmill.config import RunConfig, VQVAEModelConfig
from clipmill.evaluation import report
from clipmill.evaluation.gallery import Gallery
from clipmill.evaluation.nearest import describe_codes, nearest_section
from clipmill.models.export import load_prior
from clipmill.models.vqvae import VQVAE, to_pixels
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes
from clipmill.shards.manifest import Manifest
from tests.evaluation.toy_run import Unleased, metrics_of


def clips(features: np.ndarray, name: str) -> dict[str, np.ndarray]:
    return {
        "place": features.astype(np.float16),
        "key": np.array([f"{name}_{number}" for number in range(len(features))]),
    }


@pytest.fixture
def features() -> np.ndarray:
    """Of 3,000 clips; no two are alike."""
    return np.random.default_rng(0).normal(size=(3000, 32))


def test_a_copy_is_named_with_its_training_clip(features: np.ndarray) -> None:
    train, val, made = features[:1500], features[1500:2500], features[2500:2600].copy()
    made[17] = train[1234]
    made[40] = train[7] + 0.01
    found = nearest_section(clips(made, "sample"), clips(val, "val"), clips(train, "train"))
    assert found is not None
    assert found["num_training"] == 1500
    assert [pair["numbers"] for pair in found["pairs"][:2]] == [[17, 1234], [40, 7]]
    assert (found["pairs"][0]["sample"], found["pairs"][0]["training"]) == ("sample_17", "train_1234")
    assert found["pairs"][0]["distance"] == 0
    assert 0 < found["pairs"][1]["distance"] < 0.05 < 0.3 < found["pairs"][2]["distance"]
    assert found["median"] == pytest.approx(1, abs=0.1)  # the others are as new as the validation clips
    assert 0.02 <= found["close_share"] <= 0.05


def test_samples_that_are_all_copies_stand_out(features: np.ndarray) -> None:
    noise = np.random.default_rng(1).normal(scale=0.05, size=(100, 32))
    found = nearest_section(
        clips(features[:100] + noise, "sample"), clips(features[1500:], "val"), clips(features[:1500], "train")
    )
    assert found is not None
    assert found["median"] < 0.1
    assert found["close_share"] == 1


def test_nothing_is_said_without_clips_or_without_a_measure(features: np.ndarray) -> None:
    some, none = clips(features[:10], "a"), clips(features[:0], "b")
    for sets in ((none, some, some), (some, none, some), (some, some, none), (some, some, some)):
        assert nearest_section(*sets) is None


def test_distances_of_features_are_those_of_embeddings_in_cells() -> None:
    torch.manual_seed(0)
    model = VQVAEModelConfig(num_codes=64, embedding_dim=256, hidden_dim=32, num_res_layers=1)
    tokenizer = VQVAE(model, 1.0).eval()
    codes = torch.randint(64, (40, 4, 8, 8))
    with torch.inference_mode():
        cells = tokenizer.quantizer.embed(codes[..., None]).unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
        found = torch.from_numpy(describe_codes(codes, tokenizer)).float()
    assert found.shape == (40, 4 * 4 * 4 * 16)
    ratios = torch.pdist(found) / torch.pdist(cells.flatten(1).float())
    assert 0.85 < ratios.min() < 1 < ratios.max() < 1.15


def test_the_report_shows_the_closest_samples_above_their_training_clips(config: RunConfig) -> None:
    pairs = metrics_of(config)["samples"]["nearest"]["pairs"]
    gallery = Gallery.load(storage.join(config.folder("evaluation", "default"), "nearest.npz"))
    assert list(gallery.rows) == ["sample", "training clip"]
    samples = ShardDataset(Manifest.load(config.folder("samples", "default"), "samples"), decode_clip)
    tokens = ShardDataset(Manifest.load(config.folder("tokens", "train"), "tokens"), decode_codes)
    _, tokenizer, _, _ = load_prior(config.folder("prior"))
    for pair, made, training in zip(pairs, *gallery.rows.values(), strict=True):
        sample, clip = pair["numbers"]
        assert (samples[sample]["key"], tokens[clip]["key"]) == (pair["sample"], pair["training"])
        assert np.array_equal(made, samples[sample]["video"])
        with torch.inference_mode():
            codes = torch.from_numpy(tokens[clip]["codes"].astype(np.int64))[None]
            assert np.array_equal(training, to_pixels(tokenizer.decode(codes))[0].numpy())
    report.run(config, Unleased(config.folder("report"), 1))
    page = storage.read_bytes(config.folder("report", "index.html")).decode()
    assert "Nearest training clips" in page
    assert f"sample {pairs[0]['numbers'][0]} and {pairs[0]['training']}" in page
