"""What a published prior's checkpoint holds beside the rest if it is conditioned on frames, by its published names.

The network over frames has 34 million weights: they are drawn from their names, by a generator whose stream numpy
promises never to change, and what the published code computes with them lies beside this file.
"""

from __future__ import annotations

import zlib
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor

NUM_FRAMES = 2


def given_frames(batch_size: int, resolution: int) -> Tensor:
    """Uint8 [B, 2, H, W, 3]."""
    draw = np.random.RandomState(0)
    return torch.from_numpy(draw.randint(256, size=(batch_size, NUM_FRAMES, resolution, resolution, 3), dtype=np.uint8))


def frames_state(args: Namespace) -> dict[str, Tensor]:
    """Of a checkpoint with these settings."""
    dim, classes, side = args.hidden_dim, args.class_cond_dim, args.resolution // 4
    shapes: dict[str, tuple[int, ...]] = {}
    for axis, length in enumerate((NUM_FRAMES, side, side)):
        shapes[f"cond_pos_embd.emb.d_{axis}"] = (length, 80)
    for layer in range(args.layers):
        block = f"attn_stack.attn_nets.{layer}"
        if classes:
            shapes |= {f"{block}.pre_enc_norm.{name}.weight": (dim, classes) for name in ("w", "wb")}
        else:
            shapes |= {f"{block}.pre_enc_norm.{name}": (dim,) for name in ("g", "b")}
        values = 240 // args.heads * args.heads
        sizes = {"w_qs": (dim, dim), "w_ks": (dim, 240), "w_vs": (values, 240), "fc": (dim, values)}
        shapes |= {f"{block}.enc_attn.{name}.weight": size for name, size in sizes.items()}
        shapes[f"{block}.enc_attn.fc.bias"] = (dim,)
    shapes["resnet.stem.0.weight"] = (64, 3, 3, 3, 3)
    shapes |= _norm("resnet.stem.1", 64)
    width = 64
    for group, (wider, count) in enumerate(((64, 3), (128, 4), (256, 6), (240, 3)), start=1):
        for index in range(count):
            name = f"resnet.group{group}." + (f"blocks.{index - 1}" if index else "start_block")
            if index == 0:
                shapes[f"{name}.proj_conv.weight"] = (wider, width, 1, 1, 1)
                shapes |= _norm(f"{name}.proj_bnr", wider)
            shapes[f"{name}.conv1.weight"] = (wider, width, 3, 3, 3)
            shapes[f"{name}.conv2.weight"] = (wider, wider, 3, 3, 3)
            shapes |= _norm(f"{name}.bnr1", wider) | _norm(f"{name}.bnr2", wider)
            width = wider
    return {name: _drawn(name, shape) for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.norm.norm.{kind}": (width,) for kind in ("weight", "bias")}


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights as large as trained ones: products keep the size of their input, gains are about one."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1 and not name.startswith("cond_pos_embd"):
        return torch.from_numpy(noise / np.prod(shape[1:]) ** 0.5).float()
    gain = name.endswith(("norm.weight", "norm.g"))
    return torch.from_numpy(gain + 0.1 * noise).float()
