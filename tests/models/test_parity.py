"""Ours against the published code's own outputs on its own checkpoints (tiny models)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipmill.models.export import load_prior, load_vqvae
from clipmill.models.published_sizes import VQVAESettings
from clipmill.models.videogpt import import_videogpt, load_videogpt_prior, load_videogpt_vqvae
from tests.models.published_frames import NUM_FRAMES, frames_state, given_frames
from tests.models.published_prior import published_logits, random_state, save, some_checkpoint
from tests.models.published_vqvae import PublishedVQVAE
from tests.models.test_decoding import WAYS, cached_logits

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "reference"

CLOSE = 2e-5
"""Largest difference of logits up to 5; 3.8e-5 is what a layer norm without the published 1e-5 reaches."""

pytestmark = pytest.mark.skipif(
    not (FIXTURES / "vqvae.ckpt").exists(), reason=f"no published checkpoints at {FIXTURES}"
)


def fixture(name: str) -> dict[str, Any]:
    return torch.load(FIXTURES / name, weights_only=True)


@torch.no_grad()
def test_tokenizer_gives_the_published_codes_and_reconstructions() -> None:
    model = load_videogpt_vqvae(FIXTURES / "vqvae.ckpt")
    expected = fixture("vqvae_io.pt")
    codes = model.encode(expected["video"])
    assert torch.equal(codes, expected["codes"])
    torch.testing.assert_close(model.decode(codes), expected["reconstruction"], rtol=0, atol=1e-4)
    output = model(expected["video"])
    assert torch.equal(output.codes, expected["codes"])
    torch.testing.assert_close(output.reconstruction, expected["reconstruction"], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_prior_gives_the_published_logits_and_loss(kind: str) -> None:
    prior, tokenizer = load_videogpt_prior(FIXTURES / f"prior_{kind}.ckpt")
    expected = fixture(f"prior_{kind}_io.pt")
    codes, label = expected["codes"], expected["label"]
    torch.testing.assert_close(prior(codes, label), expected["logits"].flatten(1, 3), rtol=0, atol=CLOSE)
    torch.testing.assert_close(prior.loss(codes, label).mean(), expected["loss"], rtol=0, atol=CLOSE)
    assert torch.equal(tokenizer.encode(fixture("vqvae_io.pt")["video"]), fixture("vqvae_io.pt")["codes"])


@torch.no_grad()
def test_an_imported_tokenizer_is_an_export_like_any_other(tmp_path: Path) -> None:
    kind, sha8 = import_videogpt(FIXTURES / "vqvae.ckpt", str(tmp_path))
    model, body, found = load_vqvae(str(tmp_path))
    expected = fixture("vqvae_io.pt")
    assert (kind, found) == ("vqvae", sha8)
    assert body["latent_shape"] == list(expected["codes"].shape[1:])
    assert body["clip"]["clip"] == {"num_frames": 8, "resolution": 16}
    assert torch.equal(model.encode(expected["video"]), expected["codes"])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_an_imported_prior_brings_its_tokenizer(kind: str, tmp_path: Path) -> None:
    assert import_videogpt(FIXTURES / f"prior_{kind}.ckpt", str(tmp_path / "prior"))[0] == "prior"
    prior, tokenizer, body, _ = load_prior(str(tmp_path / "prior"))
    expected = fixture(f"prior_{kind}_io.pt")
    codes, label = expected["codes"], expected["label"]
    torch.testing.assert_close(prior(codes, label), expected["logits"].flatten(1, 3), rtol=0, atol=1e-4)
    assert len(body["classes"]) == (5 if kind == "class" else 0)
    assert torch.equal(tokenizer.encode(fixture("vqvae_io.pt")["video"]), fixture("vqvae_io.pt")["codes"])
    _, sha8 = import_videogpt(FIXTURES / "vqvae.ckpt", str(tmp_path / "vqvae"))
    same = torch.equal(tokenizer.quantizer.codebook, load_vqvae(str(tmp_path / "vqvae"))[0].quantizer.codebook)
    assert (body["tokenizer"]["sha8"] == sha8) == same  # tokens of the one are tokens of the other


@torch.no_grad()
@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_a_prior_told_frames_knows_what_the_published_one_does(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "prior.ckpt"
    # Safe, for the file comes with the project.
    checkpoint = torch.load(FIXTURES / f"prior_{kind}.ckpt", weights_only=False)
    args = checkpoint["hyper_parameters"]["args"]
    args.n_cond_frames = NUM_FRAMES
    checkpoint["state_dict"] |= frames_state(args)
    torch.save(checkpoint, path)
    import_videogpt(path, str(tmp_path / "prior"))
    prior, _, body, _ = load_prior(str(tmp_path / "prior"))
    assert body["condition_shape"] == [NUM_FRAMES, 16, 16, 3]
    given = fixture(f"prior_{kind}_io.pt")
    codes, label = given["codes"], given["label"]
    logits = prior(codes, label, given_frames(len(codes), args.resolution))
    losses = F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none")
    with np.load(Path(__file__).with_name("published_frames.npz")) as published:
        expected = torch.from_numpy(published[kind]).flatten(1)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", ["full", *WAYS])
def test_a_sparse_prior_gives_the_published_step_by_step_logits(way: str) -> None:
    prior, _ = load_videogpt_prior(FIXTURES / "prior_sparse.ckpt")
    expected = fixture("prior_sparse_io.pt")
    codes = expected["codes"]
    logits = prior(codes) if way == "full" else cached_logits(prior, codes, None, way=way)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "downsample"), [((2, 16, 16), (2, 2, 2)), ((8, 8, 8), (1, 4, 4)), ((2, 8, 64), (2, 8, 1))]
)
def test_sparse_priors_of_other_layouts_give_the_published_logits(
    shape: tuple[int, int, int], downsample: tuple[int, int, int], tmp_path: Path
) -> None:
    checkpoint = some_checkpoint(shape, downsample)
    import_videogpt(save(checkpoint, tmp_path / "prior.ckpt"), str(tmp_path / "prior"))
    prior, *_ = load_prior(str(tmp_path / "prior"))
    codes = torch.randint(11, (2, *shape))
    expected = published_logits(checkpoint, codes).float()
    torch.testing.assert_close(prior(codes), expected, rtol=0, atol=CLOSE)
    last = 40
    logits = cached_logits(prior, codes, None, num_given=codes[0].numel() - last)
    torch.testing.assert_close(logits, expected[:, -last:], rtol=0, atol=CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("attn_type", ["full", "sparse"])
def test_large_residuals_keep_the_published_logits(attn_type: str, classes: int | None, tmp_path: Path) -> None:
    """Residuals of a standard deviation of 1,000: the published norm multiplies them by 1.01."""
    checkpoint = some_checkpoint(
        (4, 4, 8),
        (1, 8, 4),
        residual_scale=1000,
        head_scale=5,
        attn_type=attn_type,
        class_cond=classes is not None,
        class_cond_dim=classes,
    )
    prior, _ = load_videogpt_prior(save(checkpoint, tmp_path / "prior.ckpt"))
    codes, label = torch.randint(11, (2, 4, 4, 8)), None if classes is None else torch.tensor([2, 0])
    expected = published_logits(checkpoint, codes, label).float()
    assert expected.abs().max() > 5
    for logits in (prior(codes, label), cached_logits(prior, codes, label)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n_hiddens", [6, 22, 25])
def test_tokenizers_whose_width_is_no_multiple_of_four_give_the_published_codes(n_hiddens: int, tmp_path: Path) -> None:
    settings = {"n_hiddens": n_hiddens, "n_res_layers": 1, "embedding_dim": 5, "n_codes": 30, "downsample": (2, 4, 4)}
    args = Namespace(**settings, resolution=16, sequence_length=4)
    state = random_state(VQVAESettings.model_validate(vars(args)).sizes())
    torch.save({"state_dict": state, "hyper_parameters": {"args": args}}, tmp_path / "vqvae.ckpt")
    model, published = load_videogpt_vqvae(tmp_path / "vqvae.ckpt"), PublishedVQVAE(state, args.downsample)
    video = torch.rand(2, 3, 4, 16, 16) - 0.5
    codes = published.encode(video)
    assert len(codes.unique()) > 3
    assert torch.equal(model.encode(video), codes)
    torch.testing.assert_close(model.decode(codes), published.decode(codes).float(), rtol=1e-4, atol=1e-4)
