"""Reads the previews that a training made while it ran: ``previews/step-NNNNNNNN.png`` and ``.mp4`` in its folder."""

from __future__ import annotations

import base64
import re
from typing import NamedTuple

import numpy as np

from clipmill import storage

__all__ = ["Shown", "preview_names", "read_previews"]

MOST_SHOWN = 4

_NAME = re.compile(r"step-(\d{8})\.(png|mp4)")


class Shown(NamedTuple):
    """A preview as data URIs."""

    step: int
    picture: str | None
    film: str | None


def preview_names(folder_url: str) -> list[str]:
    """Names of the previews of a training folder, sorted."""
    names = (entry.name for entry in storage.list_folder(storage.join(folder_url, "previews")))
    return sorted(name for name in names if _NAME.fullmatch(name))


def read_previews(folder_url: str) -> list[Shown]:
    """At most `MOST_SHOWN` previews, evenly spaced, the first and the last included."""
    names = preview_names(folder_url)
    steps = sorted({name.partition(".")[0] for name in names})
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), MOST_SHOWN)).round().astype(int)

    def data(name: str, kind: str) -> str | None:
        if name not in names:
            return None
        content = storage.read_bytes(storage.join(folder_url, "previews", name))
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    return [
        Shown(int(step.removeprefix("step-")), data(f"{step}.png", "image/png"), data(f"{step}.mp4", "video/mp4"))
        for step in (steps[index] for index in chosen)
    ]
