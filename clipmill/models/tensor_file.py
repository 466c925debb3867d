"""Writes a safetensors file tensor by tensor, so that only one tensor at a time has to be in memory.

The bytes equal those of ``safetensors.torch.save``, which needs all tensors at once. The format is documented at
https://github.com/huggingface/safetensors: the length of the header (``<u8``), the header in JSON, the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Deferred", "deferred", "write_tensors"]

_DTYPES = {torch.bool: "BOOL", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
"""Names of dtypes in a header. In the file, tensors are sorted by dtype (later ones first), then by name."""
_ALIGNMENT = 8


class Deferred(NamedTuple):
    """A tensor that is read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def to(self, dtype: torch.dtype) -> Deferred:
        """The same tensor in another dtype."""
        return Deferred(self.shape, dtype, lambda: self.read().to(dtype))


def deferred(module: nn.Module) -> dict[str, Deferred]:
    """The state dict of a module, without copying it."""
    return {
        name: Deferred(tuple(value.shape), value.dtype, value.detach) for name, value in module.state_dict().items()
    }


def write_tensors(tensors: Mapping[str, Deferred], file: BinaryIO) -> str:
    """Writes a whole safetensors file.

    Args:
        tensors: by name.
        file: to write to.

    Returns:
        Its SHA-256, hex.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
    names = sorted(tensors, key=lambda name: (-ranks[tensors[name].dtype], name))
    header = _header(tensors, names)
    digest = hashlib.sha256(header)
    file.write(header)
    for name in names:
        expected = tensors[name]
        value = expected.read()
        if (tuple(value.shape), value.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not {expected.dtype} {expected.shape}")
        data = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(data)
        file.write(data)
    return digest.hexdigest()


def _header(tensors: Mapping[str, Deferred], names: list[str]) -> bytes:
    entries, offset = {}, 0
    for name in names:
        shape, dtype, _ = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
