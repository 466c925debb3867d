"""Ours against the published code's own outputs on its own checkpoints (tiny models)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipmill.models.videogpt import load_videogpt_prior, load_videogpt_vqvae, read_args

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "reference"

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
    prior, tokenizer = load_videogpt_prior(FIXTURES / f"prior_{kind}.ckpt", read_args(FIXTURES / "vqvae.ckpt"))
    expected = fixture(f"prior_{kind}_io.pt")
    codes, label = expected["codes"], expected["label"]
    torch.testing.assert_close(prior(codes, label), expected["logits"].flatten(1, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(prior.loss(codes, label).mean(), expected["loss"], rtol=0, atol=1e-4)
    assert torch.equal(tokenizer.encode(fixture("vqvae_io.pt")["video"]), fixture("vqvae_io.pt")["codes"])
