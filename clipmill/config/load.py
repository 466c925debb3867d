"""Merges YAML files and ``section.key=value`` assignments into one validated `RunConfig`.

The configs that clipmill ships are package data (``clipmill/configs``), so their names work from any folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from clipmill.config.reference import suggest_key
from clipmill.config.run import RunConfig
from clipmill.config.section import Section
from clipmill.errors import UserError

__all__ = ["load_config", "shipped_configs"]

_SHIPPED = Path(__file__).parents[1] / "configs"


def shipped_configs() -> list[str]:
    """Names of the configs that clipmill ships, such as ``demo`` or ``ablations/codes-256``."""
    return sorted(str(path.relative_to(_SHIPPED).with_suffix("")) for path in _SHIPPED.rglob("*.yaml"))


def load_config(files: Sequence[str | Path], assignments: Sequence[str] = ()) -> RunConfig:
    """Merges YAML files left to right, then ``section.key=value`` assignments, and validates the result.

    Args:
        files: paths, or names of `shipped_configs`. A file takes precedence over a shipped config of the same name.
        assignments: later assignments override earlier ones.

    Raises:
        UserError: a file is missing or is not YAML, an assignment has no ``=``, a key is unknown or a value invalid.
    """
    merged = OmegaConf.create({})
    for file in files:
        merged = _merge(merged, f"config file {file}", partial(OmegaConf.load, _find(file)))
    for assignment in assignments:
        if "=" not in assignment or assignment.startswith("="):
            raise UserError(f"cannot read {assignment!r}: write section.key=value")
        merged = _merge(merged, repr(assignment), partial(OmegaConf.from_dotlist, [assignment]))
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation such as ${rooot}
        raise UserError(f"config: {_first_line(error)}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def _find(file: str | Path) -> str | Path:
    """The path of a config: ``file`` itself, or the shipped config of that name."""
    if os.path.isfile(file):
        return file
    names = shipped_configs()
    if str(file) in names:
        return _SHIPPED / f"{file}.yaml"
    close = difflib.get_close_matches(str(file), names, n=1)
    raise UserError(
        f"config file {file} does not exist, and no shipped config has that name"
        + (f"; did you mean {close[0]}?" if close else f" (shipped: {', '.join(n for n in names if '/' not in n)})")
    )


def _merge(merged: DictConfig, source: str, load: Callable[[], Any]) -> DictConfig:
    try:
        return DictConfig(OmegaConf.merge(merged, load()))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"cannot read {source}: {_first_line(error)}; it must hold sections and keys") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _explain(error: ValidationError) -> str:
    """One line for all problems of a configuration."""
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            suggestion = suggest_key(key)
            problems.append(
                f"unknown key {key}{_known_keys(problem['loc'])}"
                + (f", did you mean {suggestion}?" if suggestion is not None else "")
            )
        elif problem["type"] == "missing":
            problems.append(f"{key} is required (add {key}=VALUE)")
        else:
            given = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"  # a whole section
            problems.append(f"{key}: {problem['msg']}{given}")
    return "config: " + "; ".join(problems)


def _known_keys(location: tuple[int | str, ...]) -> str:
    """Lists the valid keys of the section of a misspelt key."""
    section: Any = RunConfig
    for part in location[:-1]:
        field = (
            section.model_fields.get(str(part)) if isinstance(section, type) and issubclass(section, Section) else None
        )
        if field is None:
            return ""
        section = field.annotation
    if not (isinstance(section, type) and issubclass(section, Section)):
        return ""
    return f" (known here: {', '.join(section.model_fields)})"
