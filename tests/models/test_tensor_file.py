from __future__ import annotations

import hashlib
import io

import pytest
import safetensors.torch
import torch

from clipmill.models.tensor_file import Deferred, write_tensors

TENSORS = {
    "b.weight": torch.randn(3, 5),
    "a.weight": torch.randn(7).bfloat16(),
    "count": torch.tensor(3),
    "initialised": torch.tensor(True),
    "ä": torch.randn(2, 1).t(),
    "empty": torch.zeros(0, 4),
}


def test_the_bytes_are_those_of_safetensors() -> None:
    deferred = {name: Deferred(tuple(value.shape), value.dtype, value.clone) for name, value in TENSORS.items()}
    sha256 = write_tensors(deferred, file := io.BytesIO())
    expected = safetensors.torch.save({name: value.contiguous() for name, value in TENSORS.items()})
    assert file.getvalue() == expected
    assert sha256 == hashlib.sha256(expected).hexdigest()


def test_a_tensor_that_is_not_what_was_announced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch\.float32 \(2,\), not torch\.float32 \(3,\)"):
        write_tensors({"x": Deferred((3,), torch.float32, lambda: torch.zeros(2))}, io.BytesIO())
