"""Renders pages from templates, styles, scripts, and the films that they play."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

import clipmill
from clipmill.evaluation.film import Film
from clipmill.evaluation.table import pixels, short

__all__ = ["INLINE_BYTES", "PlacedFilm", "place_films", "render"]

INLINE_BYTES = 4 * 2**20
"""The page embeds films up to this total; the browser fetches the others when they come into view."""
MEDIA_FOLDER = "media"


class PlacedFilm(NamedTuple):
    """A film, and its address in the page."""

    film: Film
    src: str
    """A data URI, or a path beside the page."""


def place_films(films: Iterable[Film], inline_bytes: float = INLINE_BYTES) -> tuple[list[PlacedFilm], dict[str, bytes]]:
    """Decides which films are inside the page.

    Args:
        films: in the order of the page.
        inline_bytes: maximum total size of films inside the page; the first films are inside.

    Returns:
        The films with their places, and the files to publish, by path beside the page.
    """
    placed, files, inside = [], {}, 0
    for film in films:
        inside += len(film.data)
        if inside <= inline_bytes:
            src = f"data:video/mp4;base64,{base64.b64encode(film.data).decode()}"
        else:
            src = f"{MEDIA_FOLDER}/{film.file_name}"
            files[src] = film.data
        placed.append(PlacedFilm(film, src))
    return placed, files


def render(template: str, **values: Any) -> bytes:
    """A self-contained page as UTF-8, except for the films that `place_films` put beside it.

    Args:
        template: name of a file in ``page/``.
        values: values for the template. Names and texts of the data are escaped.
    """
    environment = Environment(
        loader=PackageLoader("clipmill.evaluation", "page"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "pixels": pixels}
    files = resources.files("clipmill.evaluation") / "page"

    def text(name: str) -> str:
        return (files / name).read_text()

    licence = f"/*\n{text('uPlot.LICENSE.txt')}*/\n"
    return (
        environment.get_template(template)
        .render(
            style=Markup(text("uPlot.min.css") + text("page.css")),
            scripts=[Markup(licence + text("uPlot.iife.min.js")), Markup(text("page.js"))],
            version=clipmill.__version__,
            **values,
        )
        .encode()
    )
