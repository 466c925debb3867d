"""Networks from TorchScript files that users provide, because clipmill may not distribute their weights."""

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
        key: config key that names the file.
        url: URL of the file.

    Raises:
        UserError: the file does not exist.
    """
    return hashlib.sha256(_read(key, url)).hexdigest()


def load_torchscript(key: str, url: str, device: torch.device) -> torch.jit.ScriptModule:
    """Loads the module of a file, in eval mode.

    Args:
        key: config key that names the file.
        url: URL of the file.
        device: device to run on.

    Raises:
        UserError: the file does not exist, or is not a TorchScript file.
    """
    data = _read(key, url)
    try:
        return torch.jit.load(io.BytesIO(data), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(
            f"{key} {url} is not a TorchScript file ({reason_of(error)}); save one with torch.jit.save"
        ) from error


def reason_of(error: Exception) -> str:
    """The line with the reason of a TorchScript error: the first, or the last if the error has a module traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]


def _read(key: str, url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise UserError(f"{key} {url} does not exist; name a TorchScript file, or unset the key") from error
        raise
