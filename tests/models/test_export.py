from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipmill.config import PriorModelConfig, VQVAEModelConfig, identity
from clipmill.errors import UserError
from clipmill.models.export import load_prior, load_vqvae, read_latest, require_prior, require_vqvae, save_export
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE

VQVAE_CONFIG = VQVAEModelConfig(hidden_dim=8, num_res_layers=1, embedding_dim=4, num_codes=16, downsample=(2, 2, 2))
PRIOR_CONFIG = PriorModelConfig(hidden_dim=12, num_heads=2, num_layers=1, class_conditional=True)


def save_vqvae(folder: Path, model: VQVAE, step: int = 7, **settings: object) -> str:
    body = {
        "kind": "vqvae",
        "model": identity(VQVAE_CONFIG) | settings,
        "latent_shape": [2, 4, 4],
        "num_codes": 16,
        "pixel_variance": 0.05,
        "step": step,
    }
    return save_export(str(folder), model, body)


def save_prior(folder: Path, prior: Prior, tokenizer: VQVAE, tokenizer_body: dict[str, Any], **settings: object) -> str:
    body = {
        "kind": "prior",
        "model": identity(PRIOR_CONFIG) | settings,
        "latent_shape": [2, 4, 4],
        "num_codes": 16,
        "num_classes": 3,
        "classes": ["a", "b", "c"],
        "tokenizer": tokenizer_body,
        "step": 9,
    }
    return save_export(str(folder), prior, body, tokenizer=tokenizer)


def trained_vqvae() -> VQVAE:
    model = VQVAE(VQVAE_CONFIG, pixel_variance=0.05)
    model(torch.rand(2, 3, 4, 8, 8) - 0.5)
    return model.eval()


@torch.no_grad()
def test_a_tokenizer_comes_back_as_it_was(tmp_path: Path) -> None:
    model = trained_vqvae()
    sha8 = save_vqvae(tmp_path, model)
    loaded, body, loaded_sha8 = load_vqvae(str(tmp_path))
    assert loaded_sha8 == body["sha8"] == sha8
    assert (body["step"], body["latent_shape"]) == (7, [2, 4, 4])
    assert not loaded.training
    assert loaded.pixel_variance == 0.05
    video = torch.rand(1, 3, 4, 8, 8) - 0.5
    assert torch.equal(loaded.encode(video), model.encode(video))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@torch.no_grad()
def test_a_prior_makes_pixels_alone(tmp_path: Path) -> None:
    tokenizer = trained_vqvae()
    save_vqvae(tmp_path / "vqvae", tokenizer)
    _, tokenizer_body, tokenizer_sha8 = load_vqvae(str(tmp_path / "vqvae"))
    prior = Prior(PRIOR_CONFIG, (2, 4, 4), 16, tokenizer.quantizer.codebook, num_classes=3).eval()
    torch.nn.init.normal_(prior.head.weight)
    sha8 = save_prior(tmp_path / "prior", prior, tokenizer, tokenizer_body)
    loaded, loaded_tokenizer, body, loaded_sha8 = load_prior(str(tmp_path / "prior" / "exports" / sha8))
    assert loaded_sha8 == sha8
    assert body["tokenizer"]["sha8"] == tokenizer_sha8
    codes = torch.randint(16, (2, 2, 4, 4))
    label = torch.tensor([0, 2])
    assert torch.equal(loaded(codes, label), prior(codes, label))
    assert torch.equal(loaded_tokenizer.decode(codes), tokenizer.decode(codes))


@torch.no_grad()
def test_narrow_weights_are_computed_with_as_float32(tmp_path: Path) -> None:
    tokenizer = trained_vqvae()
    body = {"kind": "vqvae", "model": identity(VQVAE_CONFIG), "pixel_variance": 0.05}
    url = tmp_path / "exports" / save_export(str(tmp_path), tokenizer, body, dtype="bfloat16")
    wide_url = tmp_path / "exports" / save_export(str(tmp_path), tokenizer, body)
    assert (url / "model.safetensors").stat().st_size < 0.7 * (wide_url / "model.safetensors").stat().st_size
    loaded, tokenizer_body, _ = load_vqvae(str(url))
    assert tokenizer_body["dtype"] == "bfloat16"
    state = tokenizer.state_dict()
    for name, _ in tokenizer.named_parameters():
        assert torch.equal(loaded.state_dict()[name], state[name].bfloat16().float()), name
    for name, buffer in tokenizer.named_buffers():
        assert torch.equal(loaded.state_dict()[name], buffer), name
    video = torch.rand(1, 3, 4, 8, 8) - 0.5
    assert loaded.decode(loaded.encode(video)).dtype == torch.float32


def test_the_same_content_is_one_immutable_export(tmp_path: Path) -> None:
    model = trained_vqvae()
    first = save_vqvae(tmp_path, model)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert save_vqvae(tmp_path, model) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
    second = save_vqvae(tmp_path, model, step=8)
    with torch.no_grad():
        model.to_latent.bias.add_(1)
    third = save_vqvae(tmp_path, model, step=8)
    assert len({first, second, third}) == 3
    assert load_vqvae(str(tmp_path))[2] == third
    assert load_vqvae(str(tmp_path / "exports" / first))[2] == first


def test_read_latest_needs_no_weights(tmp_path: Path) -> None:
    assert read_latest(str(tmp_path)) is None
    sha8 = save_vqvae(tmp_path, trained_vqvae())
    (tmp_path / "exports" / sha8 / "model.safetensors").unlink()
    for url in (tmp_path, tmp_path / "exports" / sha8):
        latest = read_latest(str(url))
        assert latest is not None
        assert (latest[0]["kind"], latest[1]) == ("vqvae", sha8)
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        load_vqvae(str(tmp_path))


def test_what_the_user_can_mend_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `clipmill train-vqvae`"):
        load_vqvae(str(tmp_path))
    with pytest.raises(UserError, match="run `clipmill train-prior`"):
        load_prior(str(tmp_path))
    sha8 = save_vqvae(tmp_path, trained_vqvae())
    with pytest.raises(UserError, match=r"export of a vqvae, not of a prior.*`clipmill train-prior`"):
        load_prior(str(tmp_path))
    document = tmp_path / "exports" / sha8 / "model.json"
    good = document.read_text()
    document.write_text(good.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(UserError, match="upgrade clipmill"):
        load_vqvae(str(tmp_path))
    document.write_text(json.dumps(json.loads(good) | {"pixel_variance": 0.06}))
    with pytest.raises(UserError, match="is damaged"):
        load_vqvae(str(tmp_path))
    document.write_text(good)
    weights = tmp_path / "exports" / sha8 / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_vqvae(str(tmp_path))
    document.unlink()
    with pytest.raises(UserError, match=r"model.json is missing"):
        load_vqvae(str(tmp_path))


def test_an_export_of_the_other_kind_is_refused_by_whoever_asks(tmp_path: Path) -> None:
    tokenizer = trained_vqvae()
    save_vqvae(tmp_path / "vqvae", tokenizer)
    prior = Prior(PRIOR_CONFIG, (2, 4, 4), 16, tokenizer.quantizer.codebook, num_classes=3)
    save_prior(tmp_path / "prior", prior, tokenizer, load_vqvae(str(tmp_path / "vqvae"))[1])
    for ask in (require_prior, load_prior):
        with pytest.raises(UserError, match=r"vqvae/exports/\w{8} is an export of a vqvae, not of a prior; "):
            ask(str(tmp_path / "vqvae"))
    for ask in (require_vqvae, load_vqvae):
        with pytest.raises(UserError, match=r"prior/exports/\w{8} is an export of a prior, not of a vqvae; "):
            ask(str(tmp_path / "prior"))


def test_settings_of_another_clipmill_are_named(tmp_path: Path) -> None:
    tokenizer = trained_vqvae()
    sha8 = save_vqvae(tmp_path / "vqvae", tokenizer, window=8)
    named = rf"the tokenizer of exports/{sha8} has settings .*\(model\.window: Extra inputs .*\); use the clipmill"
    with pytest.raises(UserError, match=named) as caught:
        load_vqvae(str(tmp_path / "vqvae"))
    assert "\n" not in str(caught.value)
    prior = Prior(PRIOR_CONFIG, (2, 4, 4), 16, tokenizer.quantizer.codebook, num_classes=3)
    body, _ = require_vqvae(str(tmp_path / "vqvae"))
    save_prior(tmp_path / "prior", prior, tokenizer, body)
    with pytest.raises(UserError, match=named):  # the tokenizer inside it
        load_prior(str(tmp_path / "prior"))
    sha8 = save_prior(tmp_path / "prior", prior, tokenizer, body, num_heads="two", style="new")
    with pytest.raises(UserError, match=rf"the prior of exports/{sha8} .*model\.style: .*; model\.num_heads: .*"):
        load_prior(str(tmp_path / "prior"))


def test_weights_of_another_version_are_refused_in_one_line(tmp_path: Path) -> None:
    model = trained_vqvae()
    model.encoder.renamed = torch.nn.Linear(2, 2)
    save_vqvae(tmp_path, model, 7)
    with pytest.raises(UserError, match=r"do not fit this version of clipmill \(Unexpected key\(s\).*encoder\.renamed"):
        load_vqvae(str(tmp_path))
