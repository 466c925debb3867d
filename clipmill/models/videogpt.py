"""Converts published VideoGPT checkpoints to clipmill's models (names and facts of its public code, MIT licence)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipmill import storage
from clipmill.config import PriorModelConfig, VQVAEModelConfig, identity
from clipmill.errors import UserError
from clipmill.models.export import export_body, read_latest, save_export
from clipmill.models.prior import Prior
from clipmill.models.published import Published, read_published
from clipmill.models.published_sizes import AXES, PriorSettings, VQVAESettings
from clipmill.models.resnet import BLOCKS
from clipmill.models.vqvae import VQVAE, codes_shape, latent_shape

__all__ = ["import_videogpt", "load_videogpt_prior", "load_videogpt_vqvae", "tokenizer_folder"]

Model = TypeVar("Model", VQVAE, Prior)

PIXEL_VARIANCE = 0.06
"""The published loss divides by this constant for all data."""
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


def import_videogpt(path: Path, folder_url: str, tokenizer_url: str | None = None) -> tuple[str, str]:
    """Writes a published checkpoint as an export, in the form that training stages write.

    Args:
        path: checkpoint of a VQ-VAE, or of a prior, which includes its VQ-VAE.
        folder_url: the training folder for the export.
        tokenizer_url: the training folder for a prior's VQ-VAE. None uses ``vqvae`` next to ``folder_url``, where
            `clipmill tokenize` looks for it.

    Returns:
        The kind of the checkpoint, ``vqvae`` or ``prior``, and the sha8 of its export.

    Raises:
        UserError: the file is not such a checkpoint, or the folder for its VQ-VAE has another tokenizer. Nothing was
            written.
    """
    published = read_published(path)
    tokenizer = _vqvae(published)
    tokenizer_body = _vqvae_body(tokenizer, published.vqvae)
    if published.prior is None:
        return "vqvae", save_export(folder_url, tokenizer, tokenizer_body)
    prior = _prior(published, tokenizer)
    # A prior's export describes its tokenizer like the tokenizer's own export, whose name the tokens refer to.
    named = export_body(tokenizer, tokenizer_body)
    tokenizer_url = tokenizer_folder(folder_url) if tokenizer_url is None else tokenizer_url
    _require_free(tokenizer_url, named["sha8"])
    save_export(tokenizer_url, tokenizer, tokenizer_body)
    body = _prior_body(prior, published.prior, named)
    return "prior", save_export(folder_url, prior, body, tokenizer=tokenizer)


def tokenizer_folder(folder_url: str) -> str:
    """The training folder of the tokenizer, next to the training folder of a prior."""
    return storage.join(storage.split(folder_url)[0], "vqvae")


def _require_free(tokenizer_url: str, sha8: str) -> None:
    """Raises `UserError` if the folder has another tokenizer, which must remain its latest export."""
    found = read_latest(tokenizer_url)
    if found is not None and found[1] != sha8:
        raise UserError(
            f"{tokenizer_url} has tokenizer {found[1]}, and the checkpoint's is {sha8}; name a folder for it with "
            "--tokenizer-out, and that folder as tokenize.tokenizer"
        )


def load_videogpt_vqvae(path: Path) -> VQVAE:
    """The tokenizer of a published checkpoint, in eval mode; errors as `import_videogpt`."""
    return _vqvae(read_published(path))


def load_videogpt_prior(path: Path) -> tuple[Prior, VQVAE]:
    """Prior and tokenizer of a published prior checkpoint, in eval mode; errors as `import_videogpt`."""
    published = read_published(path)
    if published.prior is None:
        raise UserError(f"{path} is a VQ-VAE's checkpoint, not a prior's")
    tokenizer = _vqvae(published)
    return _prior(published, tokenizer), tokenizer


def _vqvae(published: Published) -> VQVAE:
    settings = published.vqvae
    config = VQVAEModelConfig(
        hidden_dim=settings.n_hiddens,
        num_res_layers=settings.n_res_layers,
        embedding_dim=settings.embedding_dim,
        num_codes=settings.n_codes,
        downsample=settings.downsample,
    )
    prefix = "vqvae." if published.prior else ""
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in published.weights.items() if name.startswith(prefix)
    }
    return _loaded(VQVAE(config, PIXEL_VARIANCE), _vqvae_state(weights, settings))


def _prior(published: Published, tokenizer: VQVAE) -> Prior:
    settings = published.prior
    assert settings is not None
    sparse = settings.attn_type == "sparse"
    config = PriorModelConfig(
        hidden_dim=settings.hidden_dim,
        num_heads=settings.heads,
        num_layers=settings.layers,
        attention="strided" if sparse else "full",
        dropout=settings.dropout,
        attention_dropout=0.0 if sparse else settings.attn_dropout,  # the published sparse attention ignores it
        class_conditional=settings.class_cond,
        condition="frames" if settings.n_cond_frames else None,
    )
    size = (settings.resolution, settings.resolution)
    shape = latent_shape(tokenizer.config, settings.sequence_length, size)
    codebook = tokenizer.quantizer.codebook
    prior = Prior(config, shape, len(codebook), codebook, settings.class_cond_dim or 0, settings.condition_shape)
    return _loaded(prior, _prior_state(published.weights, config) | {"input.codebook": codebook})


def _loaded(model: Model, state: dict[str, Tensor]) -> Model:
    """Loads a state into a model. Returns it in eval mode."""
    model.load_state_dict(state)
    return model.eval()


def _vqvae_body(model: VQVAE, settings: VQVAESettings) -> dict[str, Any]:
    frames, resolution = settings.sequence_length, settings.resolution
    return {
        "kind": "vqvae",
        "model": identity(model.config),
        "latent_shape": list(codes_shape(model.config, frames, (resolution, resolution))),
        "num_codes": model.config.num_codes,
        "clip": {"clip": {"num_frames": frames, "resolution": resolution}},
        "pixel_variance": PIXEL_VARIANCE,
        "identity": {},
        "step": 0,
    }


def _prior_body(prior: Prior, settings: PriorSettings, tokenizer_body: dict[str, Any]) -> dict[str, Any]:
    num_classes = settings.class_cond_dim or 0
    return {
        "kind": "prior",
        "model": identity(prior.config),
        "latent_shape": list(prior.latent_shape),
        "num_codes": prior.num_codes,
        "num_classes": num_classes,
        "classes": [str(number) for number in range(num_classes)],
        "condition_shape": settings.condition_shape,
        "tokenizer": tokenizer_body,
        "identity": {},
        "step": 0,
    }


def _vqvae_state(published: dict[str, Tensor], settings: VQVAESettings) -> dict[str, Tensor]:
    """Converts published names to clipmill's; the attentions of the three axes are fused into one."""
    renamed = {
        "codebook.embeddings": "quantizer.codebook",
        "codebook.N": "quantizer.counts",
        "codebook.z_avg": "quantizer.sums",
    }
    for kind in ("weight", "bias"):
        renamed[f"encoder.conv_last.conv.{kind}"] = f"encoder.last.{kind}"
        renamed[f"pre_vq_conv.conv.{kind}"] = f"to_latent.{kind}"
        renamed[f"post_vq_conv.conv.{kind}"] = f"from_latent.{kind}"
        for i in range(settings.num_halvings):
            renamed[f"encoder.convs.{i}.conv.{kind}"] = f"encoder.shrink.{i}.{kind}"
            renamed[f"decoder.convts.{i}.convt.{kind}"] = f"decoder.grow.{i}.{kind}"
    state = {"quantizer.initialised": torch.tensor(True), "quantizer.num_updates": torch.tensor(0)}
    for side in ("encoder", "decoder"):
        for i in range(settings.n_res_layers):
            old, new = f"{side}.res_stack.{i}.block", f"{side}.stack.{i}.layers"
            for layer in (0, 3, 6):
                renamed |= _norm_names(f"{old}.{layer}", f"{new}.{layer}")
            for layer in (2, 5):
                renamed[f"{old}.{layer}.conv.weight"] = f"{new}.{layer}.weight"
            state |= {f"{new}.8.{name}": tensor for name, tensor in _axial(published, f"{old}.8").items()}
        last = settings.n_res_layers
        renamed |= _norm_names(f"{side}.res_stack.{last}", f"{side}.stack.{last}")
    state |= {ours: published[theirs] for theirs, ours in renamed.items()}
    # Our convolutions of kernel 1 are linear layers.
    return {name: tensor[..., 0, 0, 0] if tensor.shape[2:] == (1, 1, 1) else tensor for name, tensor in state.items()}


def _norm_names(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{name}": f"{new}.{name}" for name in ("weight", "bias", "running_mean", "running_var")}


def _axial(published: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    axes = [f"{prefix}.attn_{axis}" for axis in AXES]
    return {
        "qkv.weight": torch.cat([_qkv(published, axis) for axis in axes]),
        "out.weight": torch.cat([published[f"{axis}.fc.weight"] for axis in axes], 1),
        "out.bias": torch.stack([published[f"{axis}.fc.bias"] for axis in axes]).sum(0),
    }


def _qkv(published: dict[str, Tensor], prefix: str) -> Tensor:
    return torch.cat([published[f"{prefix}.w_{name}s.weight"] for name in "qkv"])


def _prior_state(published: dict[str, Tensor], config: PriorModelConfig) -> dict[str, Tensor]:
    """Converts published names to clipmill's; all norms go into one table."""
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
            state[f"{new}.up_projection.{kind}"] = published[f"{old}.fc_block.0.{kind}"]
            state[f"{new}.down_projection.{kind}"] = published[f"{old}.fc_block.2.{kind}"]
    rows = [_norm_rows(published, norm, config.class_conditional) for norm in [*norms, "norm"]]
    state["norms.table"] = torch.stack(rows, 1)
    return state | (_frames_state(published) if config.attends else {})


def _frames_state(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network over the first frames, and the position embeddings of their features."""
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
