"""What all sections of the configuration share: strictness, free keys, identity."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

__all__ = ["FREE", "PositiveInt", "Section", "changed_keys", "fingerprint", "identity", "is_free"]


class _Free:
    """Marks a key that may change without changing the identity of what is on disk."""

    def __repr__(self) -> str:
        return "FREE"


FREE = _Free()

PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A group of keys; unknown keys are errors and values never change after loading.

    The docstring below a key is its description in docs/configuration.md, in the JSON schema and in help texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def is_free(field: FieldInfo) -> bool:
    """Whether a key is marked ``FREE``."""
    return any(isinstance(mark, _Free) for mark in field.metadata)


def identity(section: Section) -> dict[str, Any]:
    """The identity keys of a section as plain JSON values, nested sections included."""
    keys: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        if is_free(field):
            continue
        value = getattr(section, name)
        keys[name] = identity(value) if isinstance(value, Section) else json.loads(json.dumps(value))
    return keys


def fingerprint(document: Any) -> str:
    """SHA-256 (hex) of a JSON document in canonical form: sorted keys, no spaces."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def changed_keys(recorded: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Names the identity keys whose values differ, as ``section.key (recorded -> wanted)``."""
    changes = []
    for key in sorted(recorded.keys() | wanted.keys()):
        old, new = recorded.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} ({old!r} -> {new!r})")
    return changes
