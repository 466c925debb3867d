"""An object's metadata as listings give it, and limits for fetching an object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Entry", "Limits"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    name: str
    """Name in its folder, or path relative to the walked folder, with ``/``; `resolve` finds it there."""
    bytes: int
    etag: str | None
    """The bucket's content tag; None on a local disk."""
    modified: float | None
    """Seconds since the epoch."""


class Limits(NamedTuple):
    """Upper limits for fetching one object."""

    seconds: float
    bytes: int
