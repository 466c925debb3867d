"""The published VideoGPT checkpoints, as state of our models (names and facts of its public code, MIT licence).

A checkpoint is untrusted input: only tensors, plain containers and ``argparse.Namespace`` are unpickled.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipmill.config import PriorModelConfig, VQVAEModelConfig
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, latent_shape

__all__ = ["load_videogpt_prior", "load_videogpt_vqvae", "read_args"]

PIXEL_VARIANCE = 0.06
"""The published loss divides by this, whatever the data."""


def load_videogpt_vqvae(path: Path) -> VQVAE:
    """The tokenizer of a published VQ-VAE checkpoint, in eval mode."""
    state, args = _read(path)
    return _vqvae(state, args)


def load_videogpt_prior(path: Path, tokenizer_args: argparse.Namespace) -> tuple[Prior, VQVAE]:
    """Prior and tokenizer of a published prior checkpoint, in eval mode.

    Args:
        path: the checkpoint; it holds the tokenizer's weights, but not its settings.
        tokenizer_args: the ``args`` of the tokenizer's own checkpoint (see `read_args`).
    """
    state, args = _read(path)
    vqvae_state = {name.removeprefix("vqvae."): tensor for name, tensor in state.items() if name.startswith("vqvae.")}
    tokenizer = _vqvae(vqvae_state, tokenizer_args)
    config = PriorModelConfig(
        hidden_dim=args.hidden_dim,
        num_heads=args.heads,
        num_layers=args.layers,
        dropout=args.dropout,
        attention_dropout=args.attn_dropout,
        class_conditional=args.class_cond,
    )
    shape = latent_shape(tokenizer.config, tokenizer_args.sequence_length, tokenizer_args.resolution)
    codebook = tokenizer.quantizer.codebook
    prior = Prior(config, shape, len(codebook), codebook, args.class_cond_dim or 0)
    prior.load_state_dict(_prior_state(state, config.num_layers, args.class_cond) | {"input.codebook": codebook})
    return prior.eval(), tokenizer


def read_args(path: Path) -> argparse.Namespace:
    """The settings a published checkpoint was trained with."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint["state_dict"], checkpoint["hyper_parameters"]["args"]


def _vqvae(state: dict[str, Tensor], args: argparse.Namespace) -> VQVAE:
    config = VQVAEModelConfig(
        hidden_dim=args.n_hiddens,
        num_res_layers=args.n_res_layers,
        embedding_dim=args.embedding_dim,
        num_codes=args.n_codes,
        downsample=tuple(args.downsample),
    )
    model = VQVAE(config, PIXEL_VARIANCE)
    model.load_state_dict(_vqvae_state(state, config))
    return model.eval()


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


def _prior_state(published: dict[str, Tensor], num_layers: int, class_conditional: bool) -> dict[str, Tensor]:
    """Published names to ours; all norms go into one table."""
    stack = "attn_stack"
    state = {
        "input.project.weight": published["fc_in.weight"],
        "input.start": published[f"{stack}.right_shift.sos"],
        "head.weight": published["fc_out.weight"],
    }
    state |= {f"input.axes.{axis}": published[f"{stack}.pos_embd.emb.d_{axis}"] for axis in range(3)}
    norms = []
    for i in range(num_layers):
        old, new = f"{stack}.attn_nets.{i}", f"blocks.{i}"
        norms += [f"{old}.pre_attn_norm", f"{old}.pre_fc_norm"]
        state[f"{new}.attention.qkv.weight"] = _qkv(published, f"{old}.attn")
        for kind in ("weight", "bias"):
            state[f"{new}.attention.out.{kind}"] = published[f"{old}.attn.fc.{kind}"]
            state[f"{new}.widen.{kind}"] = published[f"{old}.fc_block.0.{kind}"]
            state[f"{new}.narrow.{kind}"] = published[f"{old}.fc_block.2.{kind}"]
    rows = [_norm_rows(published, norm, class_conditional) for norm in [*norms, "norm"]]
    return state | {"norms.table": torch.stack(rows, 1)}


def _norm_rows(published: dict[str, Tensor], prefix: str, class_conditional: bool) -> Tensor:
    """Gain - 1 and bias of one norm for each class, float [classes or 1, 2, C]."""
    if class_conditional:
        return torch.stack((published[f"{prefix}.w.weight"].t(), published[f"{prefix}.wb.weight"].t()), 1)
    return torch.stack((published[f"{prefix}.g"] - 1, published[f"{prefix}.b"]))[None]
