"""Ours against the published code's own outputs on its own checkpoints (tiny models)."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipmill.errors import UserError
from clipmill.models.export import load_prior, load_vqvae
from clipmill.models.videogpt import import_videogpt, load_videogpt_prior, load_videogpt_vqvae
from tests.models.published_frames import NUM_FRAMES, frames_state, given_frames

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
    prior, tokenizer = load_videogpt_prior(FIXTURES / f"prior_{kind}.ckpt")
    expected = fixture(f"prior_{kind}_io.pt")
    codes, label = expected["codes"], expected["label"]
    torch.testing.assert_close(prior(codes, label), expected["logits"].flatten(1, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(prior.loss(codes, label).mean(), expected["loss"], rtol=0, atol=1e-4)
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


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a checkpoint ran",)


def test_what_lightning_leaves_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})  # its state is saved under the class
    state = {"monitor": "val/loss", "best_model_score": torch.tensor(0.5), "dirpath": "lightning_logs"}
    path = tmp_path / "model.ckpt"
    with pytest.MonkeyPatch.context() as lightning:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks", name):  # where pickle looks for it
            lightning.setitem(sys.modules, package, types.ModuleType(package))
        lightning.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)
        torch.save({**changed("vqvae.ckpt"), "callbacks": {callback: state}, "lr_schedulers": [{"step": 3}]}, path)
    expected = import_videogpt(FIXTURES / "vqvae.ckpt", str(tmp_path / "out"))
    assert import_videogpt(path, str(tmp_path / "out")) == expected


def changed(name: str, **settings: Any) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(FIXTURES / name, weights_only=False)
    args = vars(checkpoint["hyper_parameters"]["args"])
    args.update({key: value for key, value in settings.items() if value is not ...})
    for key in [key for key, value in settings.items() if value is ...]:
        del args[key]
    return checkpoint


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.ckpt"
    good = changed("vqvae.ckpt")
    state = good["state_dict"]
    small = {**state, "codebook.N": torch.zeros(3)}
    lacking = {name: value for name, value in state.items() if name != "pre_vq_conv.conv.bias"}
    endless = {**state, "codebook.embeddings": torch.zeros(1).expand(2**40, 16)}
    wide = {**state, "encoder.conv_last.conv.weight": torch.zeros(400_000, 1, 1, 1, 1)}
    for content, message in (
        (None, "does not exist"),
        ({"weights": 1}, "cannot be read"),
        ({**good, "extra": Harmful()}, r"holds .*print; .* refused"),
        ({**good, "state_dict": small}, "of another size"),
        ({**good, "state_dict": lacking}, r"unlike .*pre_vq_conv\.conv\.bias"),
        ({**good, "state_dict": {}}, "holds no VQ-VAE"),
        ({**good, "state_dict": {**state, "codebook.N": 3}}, "cannot be read"),
        ({**good, "state_dict": endless}, "codebook.embeddings has fewer numbers"),
        ({**good, "state_dict": wide}, "of another size"),
        ({**good, "hyper_parameters": {"args": {"downsample": (4, 4, 4)}}}, "settings of type dict"),
        (changed("vqvae.ckpt", downsample=...), "unlike .*downsample"),
        (changed("vqvae.ckpt", downsample=(3, 2, 2)), "unlike .*powers of two"),
        (changed("prior_uncond.ckpt", n_cond_frames=2), "unlike .*enc_attn"),
        (changed("prior_uncond.ckpt", heads=7), "unlike .*heads"),
        (changed("prior_uncond.ckpt", attn_type="sparse"), "attn_type=sparse"),
        (changed("prior_class.ckpt", class_cond_dim=2**40), "of another size"),
    ):
        if content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=message):
            import_videogpt(path, str(tmp_path / "out"))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        import_videogpt(path, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert "ran" not in capsys.readouterr().out
