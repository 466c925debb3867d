"""What the import of a published checkpoint makes, and what it refuses."""

from __future__ import annotations

import argparse
import itertools
import math
import pickle
import random
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipmill.errors import UserError
from clipmill.models.export import load_prior, load_vqvae
from clipmill.models.videogpt import import_videogpt, load_videogpt_prior, load_videogpt_vqvae
from tests.models.test_parity import FIXTURES

pytestmark = pytest.mark.skipif(
    not (FIXTURES / "vqvae.ckpt").exists(), reason=f"no published checkpoints at {FIXTURES}"
)


def changed(name: str, **settings: Any) -> dict[str, Any]:
    """A checkpoint with other settings; ``...`` removes one."""
    checkpoint: dict[str, Any] = torch.load(FIXTURES / name, weights_only=False)  # safe: it comes with the project
    args = vars(checkpoint["hyper_parameters"]["args"])
    args.update(settings)
    for key in [key for key, value in settings.items() if value is ...]:
        del args[key]
    return checkpoint


def with_weights(name: str, weights: dict[Any, Any]) -> dict[str, Any]:
    """A checkpoint with other weights, or functions of its own; ``...`` removes one."""
    checkpoint = changed(name)
    state = checkpoint["state_dict"]
    for key, value in weights.items():
        if value is ...:
            del state[key]
        else:
            state[key] = value(state[key]) if callable(value) else value
    return checkpoint


def refused(path: Path) -> str:
    """The one line of a refusal, after which nothing is there."""
    out = path.parent / "out"
    with pytest.raises(UserError) as caught:
        import_videogpt(path, str(out / "prior"))
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a checkpoint ran",)


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Puts a value into one place of a tensor."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return fill


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("vqvae.ckpt", {"resolution": -24}, "resolution=-24: .*greater than"),
    ("vqvae.ckpt", {"resolution": 2**40}, "resolution=1099511627776: .*less than"),
    ("vqvae.ckpt", {"resolution": 18, "downsample": (4, 4, 4)}, r"downsample \(4, 4, 4\) does not divide"),
    ("vqvae.ckpt", {"sequence_length": 8.5}, "sequence_length=8.5"),
    ("vqvae.ckpt", {"sequence_length": "8"}, "sequence_length='8'"),
    ("vqvae.ckpt", {"downsample": ...}, "downsample: Field required"),
    ("vqvae.ckpt", {"downsample": (3, 2, 2)}, "downsample .*powers of two"),
    ("vqvae.ckpt", {"downsample": (1, 1, 1)}, "downsample .*above 1"),
    ("vqvae.ckpt", {"downsample": (8, 2, 2)}, "lacks decoder.convts.2.convt.bias"),
    ("vqvae.ckpt", {"n_hiddens": 48}, r"\(24, 24, 3, 3, 3\), its settings ask for \(48, 48, 3, 3, 3\)"),
    ("vqvae.ckpt", {"n_hiddens": True}, "n_hiddens=True"),
    ("vqvae.ckpt", {"n_res_layers": 1}, "encoder.res_stack has 3 modules, its settings ask for 2"),
    ("vqvae.ckpt", {"n_res_layers": 2**16}, "encoder.res_stack has 3 modules"),
    ("vqvae.ckpt", {"n_codes": 65}, "codebook.* is of another size"),
    ("prior_uncond.ckpt", {"n_cond_frames": 2}, r"lacks attn_stack\.attn_nets\.0\.enc_attn.* more, which its settings"),
    ("prior_uncond.ckpt", {"n_cond_frames": -1}, "n_cond_frames=-1"),
    ("prior_uncond.ckpt", {"n_cond_frames": 9}, "n_cond_frames 9 exceeds sequence_length 8"),
    ("prior_uncond.ckpt", {"heads": 7}, "hidden_dim 48 is not a multiple of heads 7"),
    ("prior_uncond.ckpt", {"heads": 0}, "heads=0"),
    ("prior_uncond.ckpt", {"layers": 3}, "attn_stack.attn_nets has 2 modules, its settings ask for 3"),
    ("prior_uncond.ckpt", {"attn_type": "axial"}, "attn_type='axial'"),
    ("prior_uncond.ckpt", {"dropout": math.nan}, "dropout=nan"),
    ("prior_uncond.ckpt", {"attn_dropout": 1.5}, "attn_dropout=1.5"),
    ("prior_uncond.ckpt", {"class_cond": True}, "class_cond=True does not fit class_cond_dim=None"),
    ("prior_uncond.ckpt", {"resolution": 20}, r"places for latents of \(2, 8, 8\), its clips are of \(8, 20, 20\)"),
    ("prior_uncond.ckpt", {"sequence_length": 2**16}, "lacks vqvae.decoder.convts"),
    ("prior_uncond.ckpt", {"attn_type": "sparse"}, r"holds attn_stack.attn_nets.0.attn.attn.mask"),
    ("prior_class.ckpt", {"class_cond_dim": 7}, "is of another size"),
    ("prior_class.ckpt", {"class_cond": False}, "class_cond=False does not fit class_cond_dim=5"),
    ("prior_sparse.ckpt", {"hidden_dim": 96}, "is of another size"),
]


@pytest.mark.parametrize(("name", "settings", "message"), SETTINGS)
def test_settings_that_no_checkpoint_has_are_refused(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.save(changed(name, **settings), tmp_path / "model.ckpt")
    assert re.search(message, refused(tmp_path / "model.ckpt"))


ENC = "attn_stack.attn_nets.0.enc_attn.w_qs.weight"
BIAS = "pre_vq_conv.conv.bias"
WEIGHTS: list[tuple[str, dict[str, Any], str]] = [
    ("vqvae.ckpt", {BIAS: ...}, "lacks pre_vq_conv.conv.bias, which its settings ask for"),
    ("vqvae.ckpt", {"codebook.extra": torch.zeros(2)}, "holds codebook.extra, which its settings leave unused"),
    ("vqvae.ckpt", {"codebook.N": torch.zeros(3)}, r"codebook.N is of another size: \(3,\)"),
    ("vqvae.ckpt", {"encoder.conv_last.conv.weight": torch.zeros(400_000, 1, 1, 1, 1)}, "is of another size"),
    ("vqvae.ckpt", {BIAS: filled(math.nan)}, "pre_vq_conv.conv.bias holds values that are not finite"),
    ("vqvae.ckpt", {BIAS: filled(-math.inf)}, "pre_vq_conv.conv.bias holds values that are not finite"),
    ("vqvae.ckpt", {"encoder.res_stack.2.running_var": filled(-1)}, "running_var holds a variance below zero"),
    ("vqvae.ckpt", {"codebook.embeddings": torch.zeros(1).expand(2**40, 16)}, "embeddings has fewer numbers"),
    ("vqvae.ckpt", {"codebook.N": 3}, "codebook.N in its state_dict is of type int"),
    ("vqvae.ckpt", {3: torch.zeros(1)}, "3 in its state_dict"),
    ("vqvae.ckpt", {BIAS: torch.zeros(16, dtype=torch.int64)}, "holds torch.int64"),
    ("vqvae.ckpt", {BIAS: torch.zeros(16, dtype=torch.complex64)}, "not a plain tensor of real numbers"),
    ("vqvae.ckpt", {BIAS: torch.zeros(16).to_sparse()}, "not a plain tensor of real numbers"),
    ("vqvae.ckpt", {BIAS: torch.zeros(16, device="meta")}, "not a plain tensor of real numbers"),
    ("prior_uncond.ckpt", {ENC: torch.zeros(48, 48)}, f"holds {re.escape(ENC)}, which its settings leave unused"),
    ("prior_uncond.ckpt", {"resnet.stem.0.weight": torch.zeros(1)}, "holds resnet.stem.0.weight"),
    ("prior_uncond.ckpt", {"fc_in.weight": ...}, "lacks fc_in.weight"),
    ("prior_uncond.ckpt", {"vqvae.codebook.embeddings": ...}, "lacks vqvae.codebook.embeddings"),
    ("prior_uncond.ckpt", {"vqvae.codebook.embeddings": torch.zeros(64)}, "does not have 2 axes"),
    ("prior_uncond.ckpt", {"vqvae.codebook.z_avg": ...}, "lacks vqvae.codebook.z_avg"),
    ("prior_uncond.ckpt", {"vqvae.encoder.convs.0.conv.bias": filled(math.inf)}, "vqvae.encoder.convs.0.conv.bias"),
    ("prior_uncond.ckpt", {"attn_stack.pos_embd.emb.d_1": torch.zeros(0, 16)}, r"latents of \(2, 0, 8\)"),
    ("prior_uncond.ckpt", {"attn_stack.attn_nets.1.attn.attn.mask": filled(0.0)}, "is not a causal mask"),
    ("prior_uncond.ckpt", {"attn_stack.attn_nets.1.attn.attn.mask": torch.zeros(2, 2)}, "is of another size"),
    ("prior_class.ckpt", {"norm.g": torch.zeros(48)}, "holds norm.g"),
]


@pytest.mark.parametrize(("name", "weights", "message"), WEIGHTS)
def test_weights_that_are_not_those_of_the_settings_are_refused(
    name: str, weights: dict[Any, Any], message: str, tmp_path: Path
) -> None:
    torch.save(with_weights(name, weights), tmp_path / "model.ckpt")
    assert re.search(message, refused(tmp_path / "model.ckpt"))


CONTENTS: list[tuple[Any, str]] = [
    ({"weights": 1}, "'state_dict'"),
    ([1, 2], "indices"),
    ({"state_dict": {}, "hyper_parameters": {"args": {"resolution": 3}}}, "settings are of type dict"),
    ({"state_dict": [], "hyper_parameters": {"args": argparse.Namespace()}}, "state_dict is of type list"),
    ({"state_dict": {}, "hyper_parameters": {"args": argparse.Namespace()}}, "resolution: Field required"),
    ({"state_dict": {}, "extra": Harmful()}, r"holds .*print; .* refused"),
]


@pytest.mark.parametrize(("content", "message"), CONTENTS)
def test_files_that_hold_something_else_are_refused(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    assert re.search(message, refused(tmp_path / "model.ckpt"))
    assert "ran" not in capsys.readouterr().out


HOSTILE = {
    "global": b"cbuiltins\nprint\n(Vcode of a checkpoint ran\ntR.",
    "stack global": b"\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x03ran\x85R.",
    "instance": b"(Vran\nibuiltins\nprint\n.",
    "attribute of torch": b"ctorch._utils\n__builtins__\n.",
    "extension": b"\x80\x02\x82\x01.",
    "endless string": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "no stop": b"\x80\x02}",
    "empty": b"",
    "empty stack": b"\x80\x02.",
    "deep": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "inherited state": b"cargparse\nNamespace\n)\x81}Vx\ncposix\nsystem\nsb.",
}


@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_one_line(pickled: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(FIXTURES / "vqvae.ckpt") as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickled if name.endswith("data.pkl") else good.read(name))
    refused(path)
    assert "ran" not in capsys.readouterr().out


def test_files_of_another_format_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.ckpt"
    assert "does not exist" in refused(path)
    for content in (b"", b"no checkpoint", b"PK\x03\x04", pickle.dumps(Harmful())):
        path.write_bytes(content)
        assert "not a complete zip archive" in refused(path)
    torch.save(changed("vqvae.ckpt"), path, _use_new_zipfile_serialization=False)  # has no checksums
    assert "not a complete zip archive" in refused(path)
    with zipfile.ZipFile(FIXTURES / "vqvae.ckpt") as good, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
    assert "compressed" in refused(path)
    assert "ran" not in capsys.readouterr().out


def test_a_damaged_byte_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """Bytes between the members of an archive, and times of its members, mean nothing."""
    whole, path = (FIXTURES / "vqvae.ckpt").read_bytes(), tmp_path / "model.ckpt"
    expected = load_videogpt_vqvae(FIXTURES / "vqvae.ckpt").state_dict()
    draw = random.Random(0)
    directory = whole.rindex(b"PK\x01\x02") - 4000
    places = [draw.randrange(len(whole)) for _ in range(60)] + [
        draw.randrange(directory, len(whole)) for _ in range(60)
    ]
    num_refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            state = load_videogpt_vqvae(path).state_dict()
        except UserError:
            num_refused += 1
        else:
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items()), place
    assert num_refused > len(places) / 2
    damaged = bytearray(whole)
    for _ in range(400):
        damaged[draw.randrange(len(whole) // 4, len(whole) // 2)] ^= 0x55
    path.write_bytes(damaged)
    assert re.search(r"Bad CRC-32 for file '.*/data/\d+'", refused(path))


def test_a_member_that_claims_to_be_a_folder_keeps_its_content(tmp_path: Path) -> None:
    """Python's zipfile ignores this bit; torch would read zeros."""
    whole, path = (FIXTURES / "vqvae.ckpt").read_bytes(), tmp_path / "model.ckpt"
    damaged = bytearray(whole)
    for found in re.finditer(b"PK\x01\x02", whole):
        damaged[found.start() + 38] |= 0x10
    path.write_bytes(damaged)
    expected = load_videogpt_vqvae(FIXTURES / "vqvae.ckpt").state_dict()
    state = load_videogpt_vqvae(path).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    whole, path = (FIXTURES / "vqvae.ckpt").read_bytes(), tmp_path / "model.ckpt"
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "not a complete zip archive" in refused(path)


def test_a_member_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(FIXTURES / "vqvae.ckpt") as good:
        for lost in ("data.pkl", "data/3", "version"):
            with zipfile.ZipFile(path, "w") as bad:
                for name in good.namelist():
                    if not name.endswith(lost):
                        bad.writestr(name, good.read(name))
            refused(path)


def test_what_lightning_leaves_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    name, parsing = "pytorch_lightning.callbacks.model_checkpoint", "pytorch_lightning.utilities.parsing"
    callback = type("ModelCheckpoint", (), {"__module__": name})  # its state is saved under the class
    attributes = type("AttributeDict", (dict,), {"__module__": parsing})  # older ones save settings as such
    state = {"monitor": "val/loss", "best_model_score": torch.tensor(0.5), "dirpath": "lightning_logs"}
    path = tmp_path / "model.ckpt"
    with pytest.MonkeyPatch.context() as lightning:
        for package in (*itertools.accumulate(name.split("."), "{}.{}".format), "pytorch_lightning.utilities", parsing):
            lightning.setitem(sys.modules, package, types.ModuleType(package))  # where pickle looks for it
        lightning.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)
        lightning.setattr(sys.modules[parsing], "AttributeDict", attributes, raising=False)
        checkpoint = changed("vqvae.ckpt")
        checkpoint["hyper_parameters"] = attributes(checkpoint["hyper_parameters"])
        torch.save({**checkpoint, "callbacks": {callback: state}, "lr_schedulers": [{"step": 3}]}, path)
    expected = import_videogpt(FIXTURES / "vqvae.ckpt", str(tmp_path / "out"))
    assert import_videogpt(path, str(tmp_path / "out")) == expected


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    checkpoint = changed("prior_uncond.ckpt")
    checkpoint["state_dict"] = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, tmp_path / "prior.ckpt")
    prior, tokenizer = load_videogpt_prior(tmp_path / "prior.ckpt")
    assert {tensor.dtype for model in (prior, tokenizer) for tensor in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------- one file is enough


def test_a_priors_checkpoint_brings_its_tokenizer_as_an_export_of_its_own(tmp_path: Path) -> None:
    import_videogpt(FIXTURES / "prior_uncond.ckpt", str(tmp_path / "run" / "prior"))
    tokenizer, body, sha8 = load_vqvae(str(tmp_path / "run" / "vqvae"))
    _, inner, prior_body, _ = load_prior(str(tmp_path / "run" / "prior"))
    assert prior_body["tokenizer"] == body  # so tokens of the one are tokens of the other
    assert body["sha8"] == sha8
    for name, tensor in inner.state_dict().items():
        assert torch.equal(tensor, tokenizer.state_dict()[name])


def test_a_tokenizer_that_is_there_already_stays(tmp_path: Path) -> None:
    _, other = import_videogpt(FIXTURES / "prior_sparse.ckpt", str(tmp_path / "prior"))
    _, _, sha8 = load_vqvae(str(tmp_path / "vqvae"))
    with pytest.raises(UserError, match=r"vqvae has tokenizer .* --tokenizer-out"):
        import_videogpt(FIXTURES / "prior_uncond.ckpt", str(tmp_path / "prior"))
    assert load_vqvae(str(tmp_path / "vqvae"))[2] == sha8
    assert load_prior(str(tmp_path / "prior"))[3] == other
    import_videogpt(FIXTURES / "prior_uncond.ckpt", str(tmp_path / "prior"), str(tmp_path / "published"))
    assert load_vqvae(str(tmp_path / "vqvae"))[2] == sha8
    assert load_prior(str(tmp_path / "prior"))[2]["tokenizer"]["sha8"] == load_vqvae(str(tmp_path / "published"))[2]
