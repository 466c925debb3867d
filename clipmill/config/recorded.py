"""What a config says of clips that are already there: it must be true, or left to them."""

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
"""The key of a format's quality; the third, npy, is lossless."""


def with_recorded_clips(config: RunConfig, recipes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The config with the settings by which the clips that a stage reads were made.

    A key that the config sets must be theirs. A key that it leaves at its default becomes theirs: that of the first
    data set, where a mixture differs in it. So what is recorded beside a model is true.

    Args:
        config: of the run.
        recipes: of clips (``clip``: their clip rule, ``format`` and ``quality``, as far as they are known) by URL.

    Raises:
        UserError: a key that the config sets has another value there; the message names all of them.
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
                "them, leave them out, or shard with them into another root"
            )
    if not recipes:
        return config
    url, recipe = next(iter(recipes.items()))
    return _adopt(config, url, _settings(recipe))


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that a recipe knows, with their values."""
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
            f"the clips at {url} say that they were made with settings that this clipmill does not take ({problems}); "
            "restore their manifest, or name other clips"
        ) from error
    return config.model_copy(update={"data": data})
