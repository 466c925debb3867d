"""The published VideoGPT checkpoints, as state of our models (names and facts of its public code, MIT licence).

A checkpoint is untrusted input: only tensors, plain containers and ``argparse.Namespace`` are unpickled (of the classes
of Lightning that its trainer leaves beside them no more than the names), and no model is built before the file is known
to hold weights of its size.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipmill.config import PriorModelConfig, VQVAEModelConfig, identity
from clipmill.errors import UserError
from clipmill.models.export import export_body, save_export
from clipmill.models.prior import Prior
from clipmill.models.resnet import BLOCKS
from clipmill.models.vqvae import VQVAE, codes_shape, latent_shape

__all__ = ["import_videogpt", "load_videogpt_prior", "load_videogpt_vqvae"]

Model = TypeVar("Model", VQVAE, Prior)

PIXEL_VARIANCE = 0.06
"""The published loss divides by this, whatever the data."""
_UNLIKE_PUBLISHED = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that a file without the expected names, shapes and settings can raise."""
_RESNET_LAYERS = {
    "conv1": "body.0",
    "bnr1": "body.1",
    "conv2": "body.3",
    "bnr2": "body.4",
    "proj_conv": "shortcut.0",
    "proj_bnr": "shortcut.1",
}
_STEM = re.compile(r"resnet\.stem\.([01])(?:\.norm\.norm)?\.(weight|bias)")
_RESNET_BLOCK = re.compile(
    r"resnet\.group([1-4])\.(?:start_block|blocks\.(\d+))\."
    rf"({'|'.join(_RESNET_LAYERS)})(?:\.norm\.norm)?\.(weight|bias)"
)


def import_videogpt(path: Path, folder_url: str) -> tuple[str, str]:
    """Makes an export of a published checkpoint, as the training stages write them.

    Args:
        path: a VQ-VAE's checkpoint or a prior's, which holds its VQ-VAE.
        folder_url: the training folder that gets the export.

    Returns:
        Its kind, ``vqvae`` or ``prior``, and its sha8.

    Raises:
        UserError: the file is no such checkpoint, or one that is not supported. Nothing was written.
    """
    state, args = _read(path)
    with _blame(path):
        if not _is_prior(state):
            tokenizer = _vqvae(state, tuple(args.downsample), path)
            body = _vqvae_body(tokenizer, args)
        else:
            prior, tokenizer = _prior(state, args, path)
            # A tokenizer in a prior's export is described as in an export of its own, whose name tokens refer to.
            body = _prior_body(prior, args, export_body(tokenizer, _vqvae_body(tokenizer, args)))
    if body["kind"] == "vqvae":
        return "vqvae", save_export(folder_url, tokenizer, body)
    return "prior", save_export(folder_url, prior, body, tokenizer=tokenizer)


def load_videogpt_vqvae(path: Path) -> VQVAE:
    """The tokenizer of a published VQ-VAE checkpoint, in eval mode; errors as `import_videogpt`."""
    state, args = _read(path)
    with _blame(path):
        return _vqvae(state, tuple(args.downsample), path)


def load_videogpt_prior(path: Path) -> tuple[Prior, VQVAE]:
    """Prior and tokenizer of a published prior checkpoint, in eval mode; errors as `import_videogpt`."""
    state, args = _read(path)
    with _blame(path):
        return _prior(state, args, path)


class _Inert:
    """Stands for a class of Lightning: its trainer saves the state of callbacks under their classes."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _read(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace]:
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; name a file that the published VideoGPT code wrote")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        lightning = [name for name in foreign if name.startswith(("pytorch_lightning.", "lightning."))]
        if refused := sorted(set(foreign) - set(lightning)):
            raise UserError(
                f"{path} holds {', '.join(refused)}; files with anything but tensors and settings inside are refused, "
                "for loading them would run their code"
            )
        with torch.serialization.safe_globals([argparse.Namespace, *((_Inert, name) for name in lightning)]):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state, args = checkpoint["state_dict"], checkpoint["hyper_parameters"]["args"]
        if not isinstance(args, argparse.Namespace):
            raise TypeError(f"settings of type {type(args).__name__}")
        for name, tensor in state.items():
            # A view of one number can claim any shape.
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"{name} has fewer numbers than its shape {tuple(tensor.shape)} says")
        return state, args
    except (pickle.UnpicklingError, *_UNLIKE_PUBLISHED) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint of the published VideoGPT code: {reason}") from error


@contextmanager
def _blame(path: Path) -> Iterator[None]:
    """Turns errors of settings or weights that do not fit each other into a UserError."""
    try:
        yield
    except _UNLIKE_PUBLISHED as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path} is unlike the checkpoints of the published VideoGPT code: {reason}") from error


def _is_prior(state: dict[str, Tensor]) -> bool:
    return any(name.startswith("attn_stack.") for name in state)


def _prior(state: dict[str, Tensor], args: argparse.Namespace, path: Path) -> tuple[Prior, VQVAE]:
    if not _is_prior(state):
        raise UserError(f"{path} is a VQ-VAE's checkpoint, not a prior's")
    if args.attn_type != "full":
        raise UserError(
            f"{path} was trained with attn_type={args.attn_type}, which attends to some blocks of codes alone; only "
            "priors with attn_type=full can be imported"
        )
    vqvae_state = {name.removeprefix("vqvae."): tensor for name, tensor in state.items() if name.startswith("vqvae.")}
    # The checkpoint only names a file of its author's machine for the VQ-VAE's settings: its own tables give them.
    size = (args.resolution, args.resolution)  # the published code knows squares only
    lengths = [len(state[f"attn_stack.pos_embd.emb.d_{axis}"]) for axis in range(3)]
    t, h, w = (whole // length for whole, length in zip((args.sequence_length, *size), lengths, strict=True))
    tokenizer = _vqvae(vqvae_state, (t, h, w), path)
    config = PriorModelConfig(
        hidden_dim=len(state["fc_in.weight"]),
        num_heads=args.heads,
        num_layers=_count(state, "attn_stack.attn_nets."),
        dropout=args.dropout,
        attention_dropout=args.attn_dropout,
        class_conditional=args.class_cond,
        condition="frames" if args.n_cond_frames else None,
    )
    shape = latent_shape(tokenizer.config, args.sequence_length, size)
    codebook = tokenizer.quantizer.codebook
    prior = _loaded(
        lambda: Prior(config, shape, len(codebook), codebook, args.class_cond_dim or 0, _condition_shape(args)),
        _prior_state(state, config) | {"input.codebook": codebook},
        path,
    )
    return prior, tokenizer


def _condition_shape(args: argparse.Namespace) -> tuple[int, ...] | None:
    """Shape (n, H, W, 3) of the frames that the prior is conditioned on; None if it takes none."""
    return (args.n_cond_frames, args.resolution, args.resolution, 3) if args.n_cond_frames else None


def _vqvae(state: dict[str, Tensor], downsample: tuple[int, int, int], path: Path) -> VQVAE:
    """The tokenizer of a published state, whose shapes give all its sizes but ``downsample``."""
    if "codebook.embeddings" not in state or "encoder.conv_last.conv.weight" not in state:
        raise UserError(f"{path} holds no VQ-VAE of the published VideoGPT code")
    num_codes, embedding_dim = state["codebook.embeddings"].shape
    config = VQVAEModelConfig(
        hidden_dim=len(state["encoder.conv_last.conv.weight"]),
        num_res_layers=_count(state, "encoder.res_stack.") - 1,
        embedding_dim=embedding_dim,
        num_codes=num_codes,
        downsample=downsample,
    )
    return _loaded(lambda: VQVAE(config, PIXEL_VARIANCE), _vqvae_state(state, config), path)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Number of modules in a list."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _loaded(make: Callable[[], Model], state: dict[str, Tensor], path: Path) -> Model:
    """A model with this state, in eval mode."""
    with torch.device("meta"):
        expected = make().state_dict()
    for name in sorted(expected.keys() | state.keys()):
        wanted, found = (None if name not in each else tuple(each[name].shape) for each in (expected, state))
        if wanted != found:
            raise UserError(f"{path} lacks weights, or has some of another size: {name} is {found}, not {wanted}")
    model = make()
    model.load_state_dict(state)
    return model.eval()


def _vqvae_body(model: VQVAE, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "kind": "vqvae",
        "model": identity(model.config),
        "latent_shape": list(codes_shape(model.config, args.sequence_length, (args.resolution, args.resolution))),
        "num_codes": model.config.num_codes,
        "clip": {"clip": {"num_frames": args.sequence_length, "resolution": args.resolution}},
        "pixel_variance": PIXEL_VARIANCE,
        "identity": {},
        "step": 0,
    }


def _prior_body(prior: Prior, args: argparse.Namespace, tokenizer_body: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "prior",
        "model": identity(prior.config),
        "latent_shape": list(prior.latent_shape),
        "num_codes": prior.num_codes,
        "num_classes": args.class_cond_dim if args.class_cond else 0,
        "classes": [str(number) for number in range(args.class_cond_dim)] if args.class_cond else [],
        "condition_shape": _condition_shape(args),
        "tokenizer": tokenizer_body,
        "identity": {},
        "step": 0,
    }


def _vqvae_state(published: dict[str, Tensor], config: VQVAEModelConfig) -> dict[str, Tensor]:
    """Published names to ours; the three axes' attentions fuse into one."""
    renamed = {
        "codebook.embeddings": "quantizer.codebook",
        "codebook.N": "quantizer.counts",
        "codebook.z_avg": "quantizer.sums",
    }
    for kind in ("weight", "bias"):
        renamed[f"encoder.conv_last.conv.{kind}"] = f"encoder.last.{kind}"
        renamed[f"pre_vq_conv.conv.{kind}"] = f"to_latent.{kind}"
        renamed[f"post_vq_conv.conv.{kind}"] = f"from_latent.{kind}"
        for i in range(max(config.downsample).bit_length() - 1):
            renamed[f"encoder.convs.{i}.conv.{kind}"] = f"encoder.shrink.{i}.{kind}"
            renamed[f"decoder.convts.{i}.convt.{kind}"] = f"decoder.grow.{i}.{kind}"
    state = {"quantizer.initialised": torch.tensor(True), "quantizer.num_updates": torch.tensor(0)}
    for side in ("encoder", "decoder"):
        for i in range(config.num_res_layers):
            old, new = f"{side}.res_stack.{i}.block", f"{side}.stack.{i}.layers"
            for layer in (0, 3, 6):
                renamed |= _norm_names(f"{old}.{layer}", f"{new}.{layer}")
            for layer in (2, 5):
                renamed[f"{old}.{layer}.conv.weight"] = f"{new}.{layer}.weight"
            state |= {f"{new}.8.{name}": tensor for name, tensor in _axial(published, f"{old}.8").items()}
        last = config.num_res_layers
        renamed |= _norm_names(f"{side}.res_stack.{last}", f"{side}.stack.{last}")
    state |= {ours: published[theirs] for theirs, ours in renamed.items()}
    # Our convolutions of kernel 1 are linear layers.
    return {name: tensor[..., 0, 0, 0] if tensor.shape[2:] == (1, 1, 1) else tensor for name, tensor in state.items()}


def _norm_names(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{name}": f"{new}.{name}" for name in ("weight", "bias", "running_mean", "running_var")}


def _axial(published: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    axes = [f"{prefix}.attn_{axis}" for axis in "wht"]
    return {
        "qkv.weight": torch.cat([_qkv(published, axis) for axis in axes]),
        "out.weight": torch.cat([published[f"{axis}.fc.weight"] for axis in axes], 1),
        "out.bias": torch.stack([published[f"{axis}.fc.bias"] for axis in axes]).sum(0),
    }


def _qkv(published: dict[str, Tensor], prefix: str) -> Tensor:
    return torch.cat([published[f"{prefix}.w_{name}s.weight"] for name in "qkv"])


def _prior_state(published: dict[str, Tensor], config: PriorModelConfig) -> dict[str, Tensor]:
    """Published names to ours; all norms go into one table."""
    stack = "attn_stack"
    state = {
        "input.project.weight": published["fc_in.weight"],
        "input.start": published[f"{stack}.right_shift.sos"],
        "head.weight": published["fc_out.weight"],
    }
    state |= {f"input.axes.{axis}": published[f"{stack}.pos_embd.emb.d_{axis}"] for axis in range(3)}
    norms = []
    for i in range(config.num_layers):
        old, new = f"{stack}.attn_nets.{i}", f"blocks.{i}"
        norms.append(f"{old}.pre_attn_norm")
        state[f"{new}.attention.qkv.weight"] = _qkv(published, f"{old}.attn")
        if config.attends:
            norms.append(f"{old}.pre_enc_norm")
            state[f"{new}.cross.q.weight"] = published[f"{old}.enc_attn.w_qs.weight"]
            keys_values = [published[f"{old}.enc_attn.w_{name}s.weight"] for name in "kv"]
            state[f"{new}.cross.kv.weight"] = torch.cat(keys_values)
        norms.append(f"{old}.pre_fc_norm")
        for kind in ("weight", "bias"):
            state[f"{new}.attention.out.{kind}"] = published[f"{old}.attn.fc.{kind}"]
            if config.attends:
                state[f"{new}.cross.out.{kind}"] = published[f"{old}.enc_attn.fc.{kind}"]
            state[f"{new}.widen.{kind}"] = published[f"{old}.fc_block.0.{kind}"]
            state[f"{new}.narrow.{kind}"] = published[f"{old}.fc_block.2.{kind}"]
    rows = [_norm_rows(published, norm, config.class_conditional) for norm in [*norms, "norm"]]
    state["norms.table"] = torch.stack(rows, 1)
    return state | (_frames_state(published) if config.attends else {})


def _frames_state(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network over the first frames, and where their features are."""
    state = {f"condition.axes.{axis}": published[f"cond_pos_embd.emb.d_{axis}"] for axis in range(3)}
    for name, tensor in published.items():
        if stem := _STEM.fullmatch(name):
            layer, kind = stem.groups()
            state[f"condition.encoder.stem.{layer}.{kind}"] = tensor
        elif block := _RESNET_BLOCK.fullmatch(name):
            group, number, layer, kind = block.groups()
            index = sum(BLOCKS[: int(group) - 1]) + (0 if number is None else 1 + int(number))
            state[f"condition.encoder.blocks.{index}.{_RESNET_LAYERS[layer]}.{kind}"] = tensor
    return state


def _norm_rows(published: dict[str, Tensor], prefix: str, class_conditional: bool) -> Tensor:
    """Gain - 1 and bias of one norm for each class, float [classes or 1, 2, C]."""
    if class_conditional:
        return torch.stack((published[f"{prefix}.w.weight"].t(), published[f"{prefix}.wb.weight"].t()), 1)
    return torch.stack((published[f"{prefix}.g"] - 1, published[f"{prefix}.b"]))[None]
