"""Networks that users bring as TorchScript files, since their weights are not ours to ship."""

from __future__ import annotations

import hashlib
import io

import torch

from clipmill import storage
from clipmill.errors import UserError

__all__ = ["load_torchscript", "reason_of", "weights_sha256"]


def weights_sha256(key: str, url: str) -> str:
    """Hash of a weights file.

    Args:
        key: of the configuration, which names the file.
        url: of the file.

    Raises:
        UserError: there is none.
    """
    return hashlib.sha256(_read(key, url)).hexdigest()


def load_torchscript(key: str, url: str, device: torch.device) -> torch.jit.ScriptModule:
    """The module of a file, in eval mode.

    Args:
        key: of the configuration, which names the file.
        url: of the file.
        device: to run on.

    Raises:
        UserError: there is no such file, or it is no TorchScript.
    """
    data = _read(key, url)
    try:
        return torch.jit.load(io.BytesIO(data), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(
            f"{key} {url} is no TorchScript file ({reason_of(error)}); save one with torch.jit.save"
        ) from error


def reason_of(error: Exception) -> str:
    """The telling line of a TorchScript error: the first, or after a trace through the module the last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]


def _read(key: str, url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise UserError(f"{key} {url} is not there; name a TorchScript file, or leave it out") from error
        raise
