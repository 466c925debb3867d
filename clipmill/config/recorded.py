"""Checks a config against existing clips: its clip settings must match those the clips were made with, or be unset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from clipmill.config.data import ClipConfig
from clipmill.config.run import RunConfig
from clipmill.config.section import Section, identity
from clipmill.errors import UserError

__all__ = ["with_recorded_clips"]


_QUALITY_KEYS = {"mp4": "data.crf", "mjpeg": "data.jpeg_quality"}
"""The quality key of each lossy format; npy is lossless."""


def with_recorded_clips(config: RunConfig, recipes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Returns the config with the settings with which a stage's input clips were made.

    A key that the config sets must agree with the clips. A key that it does not set takes the clips' value; if the data
    sets of a mixture differ, the value of the first. The config recorded with a model is therefore correct.

    Args:
        config: the run's config.
        recipes: recipes of the clips by URL (``clip``: the clip rule, ``format``, ``quality``; unknown ones are
            missing).

    Raises:
        UserError: keys that the config sets differ from the clips'; the message names all of them.
    """
    for url, recipe in recipes.items():
        found, wanted = _settings(recipe), _set_keys(config)
        changed = [
            f"{key} ({found[key]!r} -> {wanted[key]!r})"
            for key in sorted(found.keys() & wanted.keys())
            if found[key] != wanted[key]
        ]
        if changed:
            raise UserError(
                f"the clips at {url} were made with other settings than this config's: {', '.join(changed)}. Restore "
                "these keys, remove them from the config, or shard with the new values into another root"
            )
    if not recipes:
        return config
    url, recipe = next(iter(recipes.items()))
    return _adopt(config, url, _settings(recipe))


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys that a recipe states, with their values."""
    known = {
        f"data.clip.{key}": value for key, value in recipe.get("clip", {}).items() if key in ClipConfig.model_fields
    }
    if "format" in recipe:
        known["data.format"] = recipe["format"]
        if quality_key := _QUALITY_KEYS.get(recipe["format"]):
            known[quality_key] = recipe.get("quality")
    return known


def _set_keys(config: RunConfig) -> dict[str, Any]:
    """The keys of ``data`` and ``data.clip`` that a file or an assignment sets, with their values."""

    def keys_of(section: Section, prefix: str) -> dict[str, Any]:
        values = identity(section)
        return {prefix + key: values[key] for key in section.model_fields_set & values.keys()}

    return keys_of(config.data, "data.") | keys_of(config.data.clip, "data.clip.")


def _adopt(config: RunConfig, url: str, found: dict[str, Any]) -> RunConfig:
    clip_prefix = "data.clip."
    clip_keys = {key.removeprefix(clip_prefix): value for key, value in found.items() if key.startswith(clip_prefix)}
    data_keys = {key.removeprefix("data."): value for key, value in found.items() if not key.startswith(clip_prefix)}
    try:
        clip = ClipConfig.model_validate(config.data.clip.model_dump() | clip_keys)
        data = type(config.data).model_validate(config.data.model_dump() | data_keys | {"clip": clip})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(
            f"the manifest of the clips at {url} has settings that this clipmill does not support ({problems}); "
            "restore the manifest, or use other clips"
        ) from error
    return config.model_copy(update={"data": data})
