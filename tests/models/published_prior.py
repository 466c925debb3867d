"""Checkpoints of published priors with random weights, and the logits that the published code computes from them.

Written from the facts of the published code alone, position by position and in float64, without what it is compared to.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipmill.models.published_sizes import PriorSettings, VQVAESettings
from clipmill.models.resnet import WIDTHS

BLOCK, LOCAL_BLOCKS = 32, 4


def blocks_seen(shape: tuple[int, ...]) -> list[list[int]]:
    """The blocks that each block of a strided layout sees, from the published rule, block by block."""
    grid = list(shape)
    while len(grid) > 1 and grid[-1] <= BLOCK:
        last = grid.pop()
        grid[-1] *= last
    grid[-1] //= BLOCK
    places = list(itertools.product(*map(range, grid)))
    seen = []
    for row, place in enumerate(places):
        local = range(max(0, row - LOCAL_BLOCKS), row + 1)
        strided = [
            places.index((*place[:axis], other, *place[axis + 1 :]))
            for axis in range(len(grid) - 1)
            for other in range(place[axis] + 1)
        ]
        seen.append(sorted({*local, *strided}))
    return seen


def positions_seen(shape: tuple[int, ...]) -> Tensor:
    """The same for positions, bool [L, L]."""
    length = math.prod(shape)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for row, columns in enumerate(blocks_seen(shape)):
        for column in columns:
            mask[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = True
    return mask.tril()


def some_checkpoint(
    shape: tuple[int, int, int],
    downsample: tuple[int, int, int],
    residual_scale: float = 1.0,
    head_scale: float = 1.0,
    **settings: Any,
) -> dict[str, Any]:
    """A prior's checkpoint over latents of a shape, with random weights.

    Args:
        shape: (t, h, w).
        downsample: of its VQ-VAE, such that h and w are of one resolution.
        residual_scale: multiplies what enters the residual stream.
        head_scale: multiplies the logits.
        settings: of the prior, in place of those here.
    """
    args = Namespace(
        vqvae="elsewhere.ckpt",
        n_cond_frames=0,
        class_cond=False,
        class_cond_dim=None,
        hidden_dim=24,
        heads=2,
        layers=2,
        dropout=0.2,
        attn_type="sparse",
        attn_dropout=0.3,
        resolution=shape[1] * downsample[1],
        sequence_length=shape[0] * downsample[0],
    )
    vars(args).update(settings)
    vqvae = VQVAESettings(
        resolution=args.resolution,
        sequence_length=args.sequence_length,
        n_hiddens=8,
        n_res_layers=1,
        embedding_dim=6,
        n_codes=11,
        downsample=downsample,
    )
    sizes = vqvae.sizes("vqvae.") | PriorSettings(**vars(args)).sizes(shape, vqvae)
    state = random_state(sizes)
    state["fc_in.weight"] *= residual_scale
    state["fc_out.weight"] *= head_scale
    return {"state_dict": state, "hyper_parameters": {"args": args}}


def random_state(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights as large as trained ones: products keep about the size of their input, gains are about one."""
    state = {}
    for name, size in sizes.items():
        drawn = torch.randn(size) * (0.3 if len(size) < 2 else (size[-1] if len(size) == 2 else WIDTHS[0]) ** -0.5)
        state[name] = drawn.abs() if name.endswith(("running_var", ".N")) else drawn
        if name.endswith((".g", "norm.weight")):
            state[name] += 1
    return state


def save(checkpoint: dict[str, Any], path: Path) -> Path:
    torch.save(checkpoint, path)
    return path


def published_logits(checkpoint: dict[str, Any], codes: Tensor, label: Tensor | None = None) -> Tensor:
    """Float64 [B, L, K] of codes int64 [B, t, h, w] and, for a prior with classes, labels int64 [B]."""
    state = {name: tensor.double() for name, tensor in checkpoint["state_dict"].items()}
    args, shape, dim = (
        checkpoint["hyper_parameters"]["args"],
        codes.shape[1:],
        checkpoint["hyper_parameters"]["args"].hidden_dim,
    )
    embedded = state["vqvae.codebook.embeddings"][codes].flatten(1, 3) @ state["fc_in.weight"].t()
    start = state["attn_stack.right_shift.sos"].expand(len(codes), 1, dim)
    tables = [state[f"attn_stack.pos_embd.emb.d_{axis}"] for axis in range(3)]
    places = torch.stack(
        [torch.cat([t[i], h[j], w[k]]) for t, h, w in [tables] for i, j, k in itertools.product(*map(range, shape))]
    )
    x = torch.cat((start, embedded[:, :-1]), 1) + places
    seen = (
        positions_seen(tuple(shape))
        if args.attn_type == "sparse"
        else torch.ones(len(places), len(places)).tril().bool()
    )

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred * (1e-5 + centred.square().mean(-1, keepdim=True).rsqrt())
        if label is None:
            return unit * state[f"{name}.g"] + state[f"{name}.b"]
        gain, bias = (state[f"{name}.{part}.weight"][:, label].t()[:, None] for part in ("w", "wb"))
        return unit * (1 + gain) + bias

    def heads(x: Tensor, name: str) -> Tensor:
        return (x @ state[f"{name}.weight"].t()).unflatten(-1, (args.heads, -1)).transpose(1, 2)

    for layer in range(args.layers):
        name = f"attn_stack.attn_nets.{layer}"
        y = norm(x, f"{name}.pre_attn_norm")
        q, k, v = (heads(y, f"{name}.attn.w_{part}s") for part in "qkv")
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ state[f"{name}.attn.fc.weight"].t() + state[f"{name}.attn.fc.bias"]
        y = norm(x, f"{name}.pre_fc_norm") @ state[f"{name}.fc_block.0.weight"].t() + state[f"{name}.fc_block.0.bias"]
        x = x + (y * (1.702 * y).sigmoid()) @ state[f"{name}.fc_block.2.weight"].t() + state[f"{name}.fc_block.2.bias"]
    return norm(x, "norm") @ state["fc_out.weight"].t()
