"""Exports: a model as an immutable folder that needs nothing else to be used.

    <training folder>/exports/<sha8>/model.safetensors    weights (float32, or bfloat16 on request) and float32 state
                                     model.json           description of the model (schema 1), hash of the weights
                      exports/latest.json                 names the newest sha8; written last

``sha8`` is the start of a hash over weights and body, so equal content has the same name and saving it twice changes
nothing. A prior's export holds its whole tokenizer: the weights under ``tokenizer.``, the tokenizer's model.json under
``tokenizer`` in the body.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from clipmill import storage
from clipmill.config import PriorModelConfig, Section, VQVAEModelConfig, fingerprint
from clipmill.errors import UserError
from clipmill.models.prior import Prior
from clipmill.models.tensor_file import Deferred, deferred, write_tensors
from clipmill.models.vqvae import VQVAE
from clipmill.scratch import ScratchFolder

__all__ = [
    "Dtype",
    "export_body",
    "exported_steps",
    "load_prior",
    "load_vqvae",
    "model_config",
    "read_latest",
    "require_condition",
    "require_prior",
    "require_vqvae",
    "require_vqvae_for",
    "save_export",
]

SCHEMA = 1
_SHA8 = re.compile("[0-9a-f]{8}")
NAMES = {"vqvae": "tokenizer", "prior": "prior"}
TRAINING_COMMAND = {"vqvae": "train-vqvae", "prior": "train-prior"}
Dtype = Literal["float32", "bfloat16"]
"""Dtype of the weights in an export. Weights are always loaded as float32. Buffers (codebook, statistics) and a prior's
tokenizer are always stored as float32, so that codes decode to the same pixels.
"""
ModelConfig = TypeVar("ModelConfig", bound=Section)


def save_export(
    folder_url: str,
    model: nn.Module,
    body: dict[str, Any],
    tokenizer: nn.Module | None = None,
    dtype: Dtype = "float32",
    weights: Mapping[str, Deferred] | None = None,
) -> str:
    """Writes an export, one tensor in memory at a time, and makes it the latest of its training folder.

    Args:
        folder_url: the training folder.
        model: its float32 state dict becomes ``model.safetensors``.
        body: plain JSON for ``model.json``: ``kind`` ("vqvae" or "prior"), ``model`` (identity of the model's config)
            and the fields that the loader of that kind reads (see `load_vqvae`, `load_prior`).
        tokenizer: the tokenizer of a prior, whose weights go into the same file; None for a tokenizer.
        dtype: dtype of the weights in the file; recorded in the body if it is not float32.
        weights: the state dict for a model on the meta device; None takes the model's own.

    Returns:
        The export's sha8.
    """
    tensors = deferred(model)
    if weights is not None:
        if wrong := {name for name, own in tensors.items() if name not in weights or weights[name].shape != own.shape}:
            raise ValueError(f"missing weights, or weights of another shape, for {', '.join(sorted(wrong))}")
        tensors = {name: weights[name] for name in tensors}
    if dtype != "float32":
        tensors |= {name: tensors[name].to(getattr(torch, dtype)) for name, _ in model.named_parameters()}
        body = body | {"dtype": dtype}
    if tokenizer is not None:
        tensors |= {f"tokenizer.{name}": value for name, value in deferred(tokenizer).items()}
    with ScratchFolder("export") as folder:
        path = folder / "model.safetensors"
        with path.open("wb") as file:
            document = _named(body, write_tensors(tensors, file))
        sha8 = document["sha8"]
        export_url = storage.join(folder_url, "exports", sha8)
        if not storage.exists(storage.join(export_url, "model.json")):
            storage.publish_file(path, storage.join(export_url, "model.safetensors"))
            storage.publish_document(storage.join(export_url, "model.json"), document, SCHEMA)
    if _latest_sha8(folder_url) != sha8:
        storage.publish_document(storage.join(folder_url, "exports", "latest.json"), {"sha8": sha8}, SCHEMA)
    return sha8


def export_body(model: nn.Module, body: dict[str, Any]) -> dict[str, Any]:
    """The body with the hash and the name that an export of this model would have; nothing is written."""
    with open(os.devnull, "wb") as nowhere:
        return _named(body, write_tensors(deferred(model), nowhere))


def _named(body: dict[str, Any], weights_sha256: str) -> dict[str, Any]:
    document = body | {"weights_sha256": weights_sha256}
    return document | {"sha8": fingerprint(document)[:8]}


def read_latest(url: str) -> tuple[dict[str, Any], str] | None:
    """Body and sha8 of an export, without its weights; None if there is no export.

    Args:
        url: a training folder (its latest export), or one export folder.

    Raises:
        UserError: the export is damaged or was written by a newer clipmill.
    """
    export_url = _export_url(url)
    if export_url is None:
        return None
    body = _read_body(export_url)
    return body, body["sha8"]


def exported_steps(folder_url: str) -> list[int]:
    """The training steps of the exports in a training folder, unordered.

    Raises:
        UserError: an export is damaged or was written by a newer clipmill.
    """
    exports_url = storage.join(folder_url, "exports")
    names = storage.list_folders(exports_url)
    whole = [name for name in names if storage.exists(storage.join(exports_url, name, "model.json"))]
    return [_read_body(storage.join(exports_url, name))["step"] for name in whole]


def require_prior(url: str) -> tuple[dict[str, Any], str]:
    """Body and sha8 of the newest prior of a training folder, without its weights.

    Raises:
        UserError: there is no export, or it is of another kind, damaged, or written by a newer clipmill.
    """
    _, body = _require_export(url, "prior")
    return body, body["sha8"]


def require_vqvae(url: str) -> tuple[dict[str, Any], str]:
    """Body and sha8 of the tokenizer that ``tokenize.tokenizer`` names, without its weights.

    Args:
        url: a training folder (its latest export), or one export folder.

    Raises:
        UserError: there is no export, or it is of another kind, damaged, or written by a newer clipmill.
    """
    _, body = _require_export(url, "vqvae")
    return body, body["sha8"]


def require_vqvae_for(url: str, clips_url: str, recipe: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Like `require_vqvae`, for a tokenizer that was trained on clips of the recipe's size.

    Raises:
        UserError: as for `require_vqvae`, or it was trained on clips of another size.
    """
    body, sha8 = require_vqvae(url)
    for key in ("num_frames", "resolution"):
        trained, found = body["clip"]["clip"][key], recipe["clip"][key]
        if trained != found:
            raise UserError(
                f"the tokenizer at {url} was trained on clips with {key}={trained}, those at {clips_url} have "
                f"{key}={found}; train a tokenizer on these clips, or name clips like its own"
            )
    return body, sha8


def model_config(body: Mapping[str, Any], section: type[ModelConfig]) -> ModelConfig:
    """The settings of an exported model.

    Args:
        body: body of the export.
        section: type of the settings: `VQVAEModelConfig` or `PriorModelConfig`.

    Raises:
        UserError: this clipmill does not support the settings.
    """
    try:
        return section.model_validate(body["model"])
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, ('model', *each['loc'])))}: {each['msg']}" for each in error.errors()]
        raise UserError(
            f"the {NAMES[body['kind']]} of exports/{body['sha8']} has settings that this clipmill does not support "
            f"({'; '.join(problems)}); use the clipmill that wrote it, or train or import it again with this one"
        ) from error


def require_condition(
    body: Mapping[str, Any], tokens_url: str, num_clips: int, facts: Mapping[str, Any], advice: str
) -> None:
    """Refuses token samples that lack a prior's condition, or have it in another shape.

    Args:
        body: body of the prior's export.
        tokens_url: folder of the samples.
        num_clips: number of samples.
        facts: facts of their manifest.
        advice: what the user should do if they do not fit.

    Raises:
        UserError: they do not fit, or this clipmill does not support the prior's settings.
    """
    condition = model_config(body, PriorModelConfig).condition
    if condition is None:
        return
    found = facts.get("fields", {}).get(condition, {"clips": 0, "shapes": []})
    if found["clips"] < num_clips or found["shapes"] != [list(body["condition_shape"])]:
        raise UserError(
            f"the prior needs {condition} of shape {body['condition_shape']}; of the {num_clips} clips at {tokens_url} "
            f"{found['clips']} have it, with shapes {found['shapes']}; {advice}"
        )


def load_vqvae(url: str) -> tuple[VQVAE, dict[str, Any], str]:
    """Loads a tokenizer, in eval mode on the CPU; reads ``model`` and ``pixel_variance`` of its body.

    Args:
        url: a training folder (its latest export), or one export folder.

    Returns:
        The model, the body, the sha8.

    Raises:
        UserError: there is no export, or it is of another kind, damaged, or not supported by this clipmill.
    """
    body, tensors = _read(url, "vqvae")
    return _build_vqvae(body, tensors), body, body["sha8"]


def load_prior(url: str) -> tuple[Prior, VQVAE, dict[str, Any], str]:
    """Loads a prior with its tokenizer, both in eval mode on the CPU.

    Reads ``model``, ``latent_shape``, ``num_codes``, ``num_classes``, ``condition_shape`` (if there is one) and
    ``tokenizer`` of its body.

    Args:
        url: a training folder (its latest export), or one export folder.

    Returns:
        The prior, the tokenizer, the body, the sha8.

    Raises:
        UserError: there is no export, or it is of another kind, damaged, or not supported by this clipmill.
    """
    body, tensors = _read(url, "prior")
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("tokenizer.")}
    tokenizer = {name.removeprefix("tokenizer."): tensors[name] for name in tensors.keys() - own.keys()}
    config = model_config(body, PriorModelConfig)
    shape = body.get("condition_shape")
    prior = Prior(
        config,
        tuple(body["latent_shape"]),
        body["num_codes"],
        own.get("input.codebook"),
        body["num_classes"],
        None if shape is None else tuple(shape),
    )
    _load(prior, own, body)
    return prior.eval(), _build_vqvae(body["tokenizer"], tokenizer), body, body["sha8"]


def _load(model: nn.Module, tensors: dict[str, Tensor], body: dict[str, Any]) -> None:
    """Refuses weights of other names or shapes, such as those of another version of clipmill, in one line."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[1].strip()
        raise UserError(
            f"the weights of export {body['sha8']} do not fit this version of clipmill ({problem[:200]}); "
            "load it with the version that made it, or train again"
        ) from error


def _build_vqvae(body: dict[str, Any], tensors: dict[str, Tensor]) -> VQVAE:
    model = VQVAE(model_config(body, VQVAEModelConfig), body["pixel_variance"])
    _load(model, tensors, body)
    # Store kernels in the features' memory format. Otherwise every call would copy them: 4 % of an encoding on a CPU.
    nn.utils.convert_conv3d_weight_memory_format(model, torch.channels_last_3d)
    return model.eval()


def _latest_sha8(folder_url: str) -> str | None:
    url = storage.join(folder_url, "exports", "latest.json")
    try:
        sha8 = storage.read_document(url, SCHEMA).get("sha8")
    except FileNotFoundError:
        return None
    if not (isinstance(sha8, str) and _SHA8.fullmatch(sha8)):  # it becomes part of a path
        raise UserError(f"{url} names no export ({sha8!r:.80}); restore it, or train again")
    return sha8


def _export_url(url: str) -> str | None:
    """The export folder that ``url`` names; None if there is no export."""
    sha8 = _latest_sha8(url)
    if sha8 is not None:
        return storage.join(url, "exports", sha8)
    return url if storage.exists(storage.join(url, "model.json")) else None


def _read_body(export_url: str) -> dict[str, Any]:
    """The checked model.json of an export folder, without its schema number."""
    url = storage.join(export_url, "model.json")
    try:
        body = storage.read_document(url, SCHEMA)
    except FileNotFoundError:
        raise UserError(f"{url} is missing; restore the export folder, or train again") from None
    del body["schema"]
    content = {key: value for key, value in body.items() if key != "sha8"}
    if "kind" not in body or body.get("sha8") != fingerprint(content)[:8]:
        raise UserError(f"{url} is damaged (its content does not hash to its sha8); restore it, or train again")
    return body


def _require_export(url: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Folder and body of the export that ``url`` names, which must be of this kind."""
    export_url = _export_url(url)
    if export_url is None:
        raise UserError(f"no {NAMES[kind]} at {url}; run `clipmill {TRAINING_COMMAND[kind]}` with this config first")
    body = _read_body(export_url)
    if body["kind"] != kind:
        raise UserError(
            f"{export_url} is an export of a {body['kind']}, not of a {kind}; name a folder (root, tokenize.tokenizer) "
            f"with one that `clipmill {TRAINING_COMMAND[kind]}` or `clipmill import-videogpt` wrote"
        )
    return export_url, body


def _read(url: str, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Body and verified tensors of an export of one kind."""
    export_url, body = _require_export(url, kind)
    weights_url = storage.join(export_url, "model.safetensors")
    try:
        weights = storage.read_bytes(weights_url)
    except FileNotFoundError:
        raise UserError(f"{weights_url} is missing; restore the export folder, or train again") from None
    if hashlib.sha256(weights).hexdigest() != body["weights_sha256"]:
        raise UserError(f"{weights_url} is damaged (another SHA-256 than recorded); restore it, or train again")
    tensors = safetensors.torch.load(weights)
    return body, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
