"""What all sections of the configuration share: strictness, free keys, identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

__all__ = [
    "FREE",
    "PLACE",
    "Place",
    "PositiveInt",
    "Section",
    "changed_keys",
    "fingerprint",
    "identity",
    "is_free",
    "with_places",
]


class _Free:
    """Marks a key that may change without changing the identity of what is on disk."""

    def __repr__(self) -> str:
        return "FREE"


FREE = _Free()


@dataclass(frozen=True)
class Place:
    """Marks a key that holds a path or URL, so that `with_places` converts it.

    Attributes:
        holds: tells whether a value is a path or URL; some keys accept names as well.
    """

    holds: Callable[[str], bool] = bool


PLACE = Place()


PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A group of keys; unknown keys are errors and values never change after loading.

    The docstring below a key is its description in docs/configuration.md, in the JSON schema and in help texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


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


def with_places(section: S, convert: Callable[[str, str], str], prefix: str = "") -> S:
    """A copy of a section in which every path and URL (`Place`) is converted, inner sections included.

    Keys whose values stay as they are do not count as set (`model_fields_set`) in the copy.

    Args:
        section: the section to copy.
        convert: takes the key, such as ``data.mix.0.url``, and its value; returns the new value.
        prefix: prepended to the section's own keys.
    """
    changed: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        converted = value
        if isinstance(value, Section):
            converted = with_places(value, convert, f"{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            converted = tuple(with_places(part, convert, f"{key}.{index}.") for index, part in enumerate(value))
        elif value and any(isinstance(mark, Place) and mark.holds(value) for mark in field.metadata):
            converted = convert(key, value)
        if converted != value:
            changed[name] = converted
    return section.model_copy(update=changed) if changed else section


def fingerprint(document: Any) -> str:
    """SHA-256 (hex) of a JSON document in canonical form: sorted keys, no spaces."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def changed_keys(recorded: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Lists the identity keys whose values differ, as ``section.key (recorded -> wanted)``."""
    changes = []
    for key in sorted(recorded.keys() | wanted.keys()):
        old, new = recorded.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} ({old!r} -> {new!r})")
    return changes
