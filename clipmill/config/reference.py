"""Metadata of every configuration key, for help texts, completion, suggestions and docs/configuration.md."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from clipmill.config.run import RunConfig
from clipmill.config.section import Section, is_free

__all__ = ["Key", "SectionReference", "all_sections", "json_schema", "markdown", "schema_keys", "suggest_key"]


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        path: such as ``data.clip.num_frames``; keys of a list's sections contain ``[]``.
        kind: the values it accepts, in words, such as ``integer > 0 or null``.
        default: the default as a JSON value; meaningless if ``has_default`` is false.
        has_default: False for a key that a config must set.
        description: its docstring in the schema, on one line; may be empty.
        is_free: whether its value may change in the middle of a run.
    """

    path: str
    kind: str
    default: Any
    has_default: bool
    description: str
    is_free: bool


@dataclass(frozen=True)
class SectionReference:
    """One section: its path (empty for the top level), its description, and its own keys in order."""

    path: str
    description: str
    keys: tuple[Key, ...]


@cache
def all_sections() -> tuple[SectionReference, ...]:
    """All sections, each before the sections inside it."""
    return tuple(_sections(RunConfig, ""))


@cache
def schema_keys() -> tuple[Key, ...]:
    """All keys that an assignment can set, in the order of the schema."""
    return tuple(key for section in all_sections() for key in section.keys if "[]" not in key.path)


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file. No key is required, since several files and assignments make one config."""
    schema = RunConfig.model_json_schema()
    schema["title"] = "clipmill run"
    for definition in (schema, *schema["$defs"].values()):
        definition.pop("required", None)
        for name, field in definition["properties"].items():
            field.pop("title", None)
            if "description" in field:
                definition["properties"][name]["description"] = _for_yaml(field["description"])
    return schema


def markdown() -> str:
    """The page docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "`make docs` writes this page from the schema in [clipmill/config/](../clipmill/config/). `clipmill config`",
        "prints the resolved configuration, `clipmill config --schema` the JSON schema of config files for editors",
        "([config.schema.json](config.schema.json)).",
        "",
        "A key marked `*` may change in the middle of a run. All others are the identity of what a stage has written:",
        "the stage refuses to continue its own output with another value.",
    ]
    for section in all_sections():
        lines += ["", f"## {section.path or 'Top level'}", "", section.description]
        if section.keys:
            lines += ["", "| key | values | default | |", "|---|---|---|---|"]
        for key in section.keys:
            default = f"`{json.dumps(key.default)}`" if key.has_default else "required"
            name = f"`{key.path.rpartition('.')[2]}`{'*' if key.is_free else ''}"
            lines.append(f"| {name} | {key.kind} | {default} | {_for_markdown(key.description)} |")
    return "\n".join(lines) + "\n"


def suggest_key(path: str) -> str | None:
    """The key or section that a misspelt key probably means; None if nothing is close.

    A key of the same name in another section counts as close, so ``clip.num_frames`` finds ``data.clip.num_frames``.
    """
    path = re.sub(r"\.\d+\.", "[].", path)
    known = [key.path for section in all_sections() for key in section.keys]
    known += [section.path for section in all_sections() if section.path]
    parent, _, name = path.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.7):
        return siblings[close[0]]
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    for candidates in (
        [other for other in same_name if other.endswith(f".{path}")],
        [other for other in same_name if other.startswith(f"{parent}.")],
        same_name,
    ):
        if len(candidates) == 1:
            return candidates[0]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.8)
    return close[0] if close else None


def _sections(section: type[Section], path: str) -> list[SectionReference]:
    properties = section.model_json_schema()["properties"]
    keys, inner = [], []
    for name, field in section.model_fields.items():
        key_path = f"{path}.{name}" if path else name
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Section):
            inner += _sections(field.annotation, key_path)
            continue
        has_default = not field.is_required()
        default = properties[name].get("default")
        if field.default is PydanticUndefined and has_default:
            default = field.default_factory()  # type: ignore[call-arg,misc]
        description = _for_yaml(field.description or "")
        keys.append(Key(key_path, _kind(properties[name]), default, has_default, description, is_free(field)))
        for part in get_args(field.annotation):
            if inspect.isclass(part) and issubclass(part, Section):
                inner += _sections(part, f"{key_path}[]")
    return [SectionReference(path, _one_line(inspect.getdoc(section) or ""), tuple(keys)), *inner]


def _for_yaml(docstring: str) -> str:
    """A key's docstring for readers of YAML: on one line, with null for None."""
    return re.sub(r"\bNone\b", "null", _one_line(docstring))


def _for_markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def _kind(schema: dict[str, Any]) -> str:
    """Describes in words the values that a JSON schema accepts."""
    if "anyOf" in schema:
        return " or ".join("section" if "$ref" in option else _kind(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {_kind(schema['prefixItems'][0])}"
        items = schema["items"]
        return "list of sections" if "$ref" in items else f"list: {_kind(items)}"
    if schema.get("type") == "object":
        return "mapping"
    bounds = [f"{sign} {_number(schema[name])}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([_WORDS[schema["type"]], " and ".join(bounds)]).strip()


def _number(bound: float) -> str:
    return "2^64" if bound == 2**64 else f"{bound:g}"
