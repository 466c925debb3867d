"""Reads the sidecar files of a video: ``x.txt`` gives its text, ``x.json`` its metadata, caption and label."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from clipmill import storage
from clipmill.config import DataConfig
from clipmill.pipeline.fetch import ExcludedVideo
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.sources import base_url
from clipmill.pipeline.sources.cells import BadCell, as_caption, as_text, metadata_json
from clipmill.video.kinds import stem_of

__all__ = ["read_sidecars"]

_MOST_BYTES = 2**20
"""Largest sidecar. Its content is stored with every clip, and a description is never this long."""


def read_sidecars(data: DataConfig, video: PlannedVideo) -> PlannedVideo:
    """The video with the text, label and metadata of its sidecars; unchanged without sidecars.

    Raises:
        ExcludedVideo: a sidecar cannot be read, or has another content.
        OSError: the environment failed.
    """
    for suffix in sorted((video.sidecars or "").split(), key=str.lower, reverse=True):  # a .txt before the .json
        name = stem_of(video.url) + suffix
        try:
            text = _read(data, name)
            video = replace(video, **(_from_json if suffix.lower() == ".json" else _from_txt)(data, video, text))
        except _BadSidecar as bad:
            others = ",".join(kind for kind in data.source.sidecars if f".{kind}" != suffix.lower())
            advice = f"correct or remove it, or set data.source.sidecars=[{others}]"
            raise ExcludedVideo("sidecar", f"{name} {bad}; {advice}") from bad
    return video


class _BadSidecar(Exception):
    """A sidecar is invalid; the message continues its name (``is not a JSON object``)."""


def _read(data: DataConfig, name: str) -> str:
    try:
        content = storage.read_start(storage.resolve(base_url(data.source), name), _MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise _BadSidecar("is missing since it was planned") from error
    except (PermissionError, storage.Unreadable, storage.Refused) as error:  # the video itself is readable
        raise _BadSidecar("cannot be read") from error
    if len(content) > _MOST_BYTES:
        raise _BadSidecar(f"has more than {_MOST_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BadSidecar("is not UTF-8") from error


def _from_txt(_: DataConfig, __: PlannedVideo, text: str) -> dict[str, Any]:
    return {"text": text.strip() or None}


def _from_json(data: DataConfig, video: PlannedVideo, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadSidecar("is not JSON") from error
    if not isinstance(values, dict):
        raise _BadSidecar("is not a JSON object")
    found: dict[str, Any] = {}
    try:
        keys = ("caption", "text") if video.text is None else ()
        caption = next((key for key in keys if as_caption(values.get(key)) is not None), None)
        if caption is not None:
            found["text"] = as_caption(values[caption])
        if data.source.label != "none" and (label := as_text(values.get("label"))) is not None:
            found["label"] = label
    except BadCell as bad:
        raise _BadSidecar(f"has a caption or label that {bad}") from bad
    taken = {"label"} if "label" in found else set()
    if caption is not None and not isinstance(values[caption], list):
        taken.add(caption)
    try:
        metadata = metadata_json({key: value for key, value in values.items() if key not in taken})
    except BadCell as bad:
        raise _BadSidecar(str(bad)) from bad
    return {**found, "metadata": metadata}
