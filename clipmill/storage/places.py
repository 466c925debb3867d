"""Addresses and keys of places of storage, from the section ``storage`` of a config.

The places are passed in an environment variable, so that processes that a stage starts know them too. They contain no
secrets: keys stay in other variables, or where the SDKs look for them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from clipmill.config.place import StoragePlace
from clipmill.errors import UserError
from clipmill.storage.urls import provider, scheme

__all__ = ["PLACES_VARIABLE", "place_of", "places_environment", "secret", "set_places"]

PLACES_VARIABLE = "CLIPMILL_STORAGE"


def set_places(places: Sequence[StoragePlace]) -> None:
    """Sets the places for this process and for processes that it starts. An empty list changes nothing."""
    if places:
        os.environ[PLACES_VARIABLE] = json.dumps([place.model_dump(exclude_defaults=True) for place in places])


def places_environment() -> dict[str, str]:
    """The environment variable for processes on other machines."""
    return {PLACES_VARIABLE: os.environ[PLACES_VARIABLE]} if os.environ.get(PLACES_VARIABLE) else {}


def place_of(url: str) -> StoragePlace | None:
    """The most specific place that contains a URL; None if only the environment's defaults apply.

    Raises:
        UserError: the variable is not a list of places.
    """
    wanted = _plain(url)
    found = [place for place in _places(os.environ.get(PLACES_VARIABLE, "")) if _holds(_plain(place.url), wanted)]
    return max(found, key=lambda place: len(place.url), default=None)


def _plain(url: str) -> str:
    return provider(url) + url[len(scheme(url)) :]


def _holds(place: str, url: str) -> bool:
    return url.startswith(place if place.endswith("/") else f"{place}/") or url == place


@functools.lru_cache(maxsize=16)
def _places(text: str) -> list[StoragePlace]:
    try:
        return TypeAdapter(list[StoragePlace]).validate_json(text or "[]")
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{PLACES_VARIABLE}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; it is JSON, the list that "
            "docs/storage.md shows as `storage` of a config"
        ) from error


def secret(place: StoragePlace, name: str) -> str | None:
    """The value of a variable with the place's prefix; None if the place has no prefix or the variable is not set."""
    return os.environ.get(f"{place.credentials}{name}") if place.credentials else None
