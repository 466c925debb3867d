"""Wraps DeepSpeed's writer of checkpoint files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Writer"]


class Writer:
    """Keeps the first error until all ranks have written their files.

    If the error were raised at once, the other ranks would wait in a barrier for ever.

    Args:
        inner: DeepSpeed's writer.
        on_written: called after the last file of this rank.

    Attributes:
        error: the first one, if there was any.
    """

    def __init__(self, inner: Any, on_written: Callable[[], object]) -> None:
        self._inner, self._on_written = inner, on_written
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Writes a file, or keeps the error."""
        self._try(self._inner.save, state_dict, path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a folder, or keeps the error."""
        self._try(self._inner.makedirs, path, exist_ok)

    def commit(self, info: Any) -> Any:
        """DeepSpeed calls this after the last file of each rank."""
        self._on_written()
        return self._inner.commit(info)

    def _try(self, write: Callable[..., Any], *arguments: Any) -> None:
        try:
            write(*arguments)
        except Exception as error:
            self.error = self.error or error
