"""VideoGPT at cluster scale: resumable stages turn raw videos into a trained video generator.

`load`, `open_dataset` and `write_video` are the entry points from Python (``docs/python.md``). They are imported on
first use, so ``import clipmill`` takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipmill.api import ClipDataset, Generator, Loader, Samples, Tokenizer, load, open_dataset, write_video
    from clipmill.errors import ClipmillError, UserError

__all__ = [
    "ClipDataset",
    "ClipmillError",
    "Generator",
    "Loader",
    "Samples",
    "Tokenizer",
    "UserError",
    "load",
    "open_dataset",
    "write_video",
]
__version__ = "0.1.0"

_ERRORS = {"ClipmillError", "UserError"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'clipmill' has no attribute {name!r}")
    try:
        return getattr(import_module("clipmill.errors" if name in _ERRORS else "clipmill.api"), name)
    except ModuleNotFoundError as error:
        from clipmill.errors import UserError
        from clipmill.extras import explain_missing

        missing = explain_missing(error)
        if missing is None:
            raise
        raise UserError(missing) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
