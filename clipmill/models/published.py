"""Reads and checks checkpoint files of the published VideoGPT code, without running code from them.

A checkpoint is untrusted input. It is a zip archive whose checksums must be right. Only tensors, plain containers and
``argparse.Namespace`` are unpickled; classes of Lightning, which its trainer stores too, are replaced by stubs. The
settings must be ones that the published code accepts. The weights must be exactly those that the settings imply, with
the right sizes and finite values.
"""

from __future__ import annotations

import argparse
import io
import math
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from clipmill.errors import UserError
from clipmill.models.published_sizes import PriorSettings, Settings, Sizes, VQVAESettings

__all__ = ["Published", "read_published"]

SettingsOf = TypeVar("SettingsOf", bound=Settings)

_SHOWN_NAMES = 3


class Published(NamedTuple):
    """A checkpoint of the published code, read and checked."""

    vqvae: VQVAESettings
    """Settings of the VQ-VAE, which a prior's checkpoint includes."""
    prior: PriorSettings | None
    """Settings of the prior; None for the checkpoint of a VQ-VAE."""
    weights: dict[str, Tensor]
    """All weights by their published names, float32; those of a prior's VQ-VAE begin with ``vqvae.``."""


class _CheckpointError(Exception):
    """A file is not a valid checkpoint; the message gives the reason."""


def read_published(path: Path) -> Published:
    """Reads and checks a checkpoint.

    Raises:
        UserError: the file is damaged, incomplete, or not such a checkpoint. The message uses the names in the
            checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; name a file that the published VideoGPT code wrote")
    try:
        return _checked(*_read(path))
    except _CheckpointError as error:
        raise UserError(f"{path} cannot be read as a checkpoint of the published VideoGPT code: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace]:
    """The weights and settings in a file, before they are checked."""
    archive = _whole_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(archive))
        lightning = {name for name in foreign if name.startswith(("pytorch_lightning.", "lightning."))}
        if refused := sorted(foreign - lightning):
            raise _CheckpointError(
                f"it holds {', '.join(refused)}; files that hold anything but tensors and settings are refused, "
                "because loading them would run their code"
            )
        inert = [(OrderedDict if name.endswith(".AttributeDict") else _Inert, name) for name in lightning]
        with torch.serialization.safe_globals([argparse.Namespace, *inert]):
            archive.seek(0)
            checkpoint = torch.load(archive, map_location="cpu", weights_only=True)
        state, args = checkpoint["state_dict"], checkpoint["hyper_parameters"]["args"]
    except _CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        raise _CheckpointError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
    if not isinstance(args, argparse.Namespace):
        raise _CheckpointError(f"its settings are of type {type(args).__name__}, not Namespace")
    if not isinstance(state, dict):
        raise _CheckpointError(f"its state_dict is of type {type(state).__name__}")
    for name, tensor in state.items():
        _require_plain(name, tensor)
    return state, args


def _whole_archive(path: Path) -> io.BytesIO:
    """A copy of the archive with verified checksums and new headers.

    torch checks no checksum, and reads headers differently from zipfile: a member that one flipped bit marks as a
    folder would be read as zeros.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as clean:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise _CheckpointError("its members are compressed, which torch never writes")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise _CheckpointError("its members are larger than the file; download it again")
            if len({member.filename for member in members}) < len(members):
                raise _CheckpointError("two of its members have one name; download it again")
            for member in members:
                clean.writestr(member.filename, archive.read(member))
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error) as error:
        raise _CheckpointError(
            f"it is not a complete zip archive as torch writes ({error}); download it again"
        ) from error
    copy.seek(0)
    return copy


def _require_plain(name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise _CheckpointError(f"{name} in its state_dict is of type {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        raise _CheckpointError(f"{name} is not a plain tensor of real numbers")
    # An expanded view of one number can have any shape.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise _CheckpointError(f"{name} has fewer numbers than its shape {tuple(tensor.shape)} states")


class _Inert:
    """Stub for a class of Lightning, whose trainer stores the state of callbacks under their classes."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


# ------------------------------------------------------------------------------------- what must be there


def _checked(state: dict[str, Tensor], args: argparse.Namespace) -> Published:
    if any(name.startswith(("attn_stack.", "fc_in.", "vqvae.")) for name in state):
        prior = _settings(PriorSettings, args)
        _require_modules(state, "attn_stack.attn_nets", prior.layers)
        latent_shape = tuple(_size(state, f"attn_stack.pos_embd.emb.d_{axis}", 2)[0] for axis in range(3))
        vqvae = _embedded(state, prior, latent_shape)  # counts the modules itself
        expected = vqvae.sizes("vqvae.") | prior.sizes(latent_shape, vqvae)
        masks = prior.masks(math.prod(latent_shape))
    else:
        prior, vqvae = None, _settings(VQVAESettings, args)
        _require_modules(state, "encoder.res_stack", vqvae.n_res_layers + 1)
        expected, masks = vqvae.sizes(), {}
    counters = {name.removesuffix("running_mean") + "num_batches_tracked": () for name in expected if "mean" in name}
    _require_sizes(state, expected, masks | counters)
    for name in masks.keys() & state.keys():
        _require_causal(name, state[name])
    weights = {name: state[name].float() for name in expected}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise _CheckpointError(f"{name} holds values that are not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise _CheckpointError(f"{name} holds a variance below zero")
    return Published(vqvae, prior, weights)


def _settings(kind: type[SettingsOf], args: argparse.Namespace) -> SettingsOf:
    try:
        return kind.model_validate(vars(args))
    except ValidationError as error:
        problems = []
        for each in error.errors():
            name = ".".join(map(str, each["loc"]))
            given = f"={each['input']!r:.40}" if each["type"] != "missing" else ""
            problems.append(f"{name}{given}: {each['msg']}" if name else each["msg"].removeprefix("Value error, "))
        raise _CheckpointError(f"its settings are not accepted by the published code: {'; '.join(problems)}") from error


def _embedded(state: dict[str, Tensor], prior: PriorSettings, latent_shape: tuple[int, ...]) -> VQVAESettings:
    """Settings of a prior's VQ-VAE, from the shapes of its weights; the checkpoint only names a file of its author."""
    lengths = (prior.sequence_length, prior.resolution, prior.resolution)
    if not all(latents and length % latents == 0 for length, latents in zip(lengths, latent_shape, strict=True)):
        raise _CheckpointError(
            f"attn_stack.pos_embd has places for latents of {latent_shape}, its clips are of {lengths}"
        )
    num_codes, embedding_dim = _size(state, "vqvae.codebook.embeddings", 2)
    found = argparse.Namespace(
        resolution=prior.resolution,
        sequence_length=prior.sequence_length,
        n_hiddens=_size(state, "vqvae.encoder.conv_last.conv.weight", 5)[0],
        n_res_layers=len(_modules(state, "vqvae.encoder.res_stack")) - 1,
        embedding_dim=embedding_dim,
        n_codes=num_codes,
        downsample=tuple(length // latents for length, latents in zip(lengths, latent_shape, strict=True)),
    )
    return _settings(VQVAESettings, found)


def _size(state: dict[str, Tensor], name: str, num_axes: int) -> tuple[int, ...]:
    """Shape of a weight that determines other shapes."""
    if name not in state:
        raise _CheckpointError(f"it lacks {name}")
    if state[name].dim() != num_axes:
        raise _CheckpointError(f"{name} is of another size: {tuple(state[name].shape)} does not have {num_axes} axes")
    return tuple(state[name].shape)


def _modules(state: dict[str, Tensor], prefix: str) -> set[str]:
    """The numbers of the modules in a module list."""
    return {name.removeprefix(f"{prefix}.").split(".")[0] for name in state if name.startswith(f"{prefix}.")}


def _require_modules(state: dict[str, Tensor], prefix: str, count: int) -> None:
    """Checks the number of modules, before names are generated from a count that may be absurd."""
    found = len(_modules(state, prefix))
    if found != count:
        raise _CheckpointError(f"{prefix} has {found} modules, its settings ask for {count}")


def _require_sizes(state: dict[str, Tensor], expected: Sizes, optional: Sizes) -> None:
    if missing := sorted(expected.keys() - state.keys()):
        raise _CheckpointError(f"it lacks {_listed(missing)}, which its settings ask for")
    if unknown := sorted(state.keys() - expected.keys() - optional.keys()):
        raise _CheckpointError(f"it holds {_listed(unknown)}, which its settings leave unused")
    for name, wanted in (expected | optional).items():
        if name in state and tuple(state[name].shape) != wanted:
            raise _CheckpointError(
                f"{name} is of another size: {tuple(state[name].shape)}, its settings ask for {wanted}"
            )
        if name in expected and not state[name].is_floating_point():
            raise _CheckpointError(f"{name} holds {state[name].dtype}, not floating-point numbers")


def _require_causal(name: str, mask: Tensor) -> None:
    """Checks that a stored mask is causal. It can then be ignored, because clipmill computes the same one."""
    for row, seen in enumerate(mask):
        if not (seen[: row + 1] == 1).all() or seen[row + 1 :].any():
            raise _CheckpointError(
                f"{name} is not a causal mask: position {row} attends to later positions, or not to all earlier ones"
            )


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
