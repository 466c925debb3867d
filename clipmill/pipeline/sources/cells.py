"""Parses and checks the cells of tables and the values of JSON sidecars."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["BadCell", "as_caption", "as_seconds", "as_text", "check_unicode", "metadata_json"]

_SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate: half a character from a JSON escape, or (from U+DC80 on) Python's mark of a byte that is not UTF-8.
"""


class BadCell(Exception):
    """A cell has an invalid value; the message continues the column's name (``is a list, not one value``)."""


def as_text(value: Any) -> str | None:
    """A cell as text, without surrounding white space; None if it is empty, null or NaN.

    A whole number stays whole even if other rows made its column a floating-point one (``3``, not ``3.0``).

    Raises:
        BadCell: the cell is a list or object, or not valid Unicode.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, list | tuple | dict):
        raise BadCell(f"is {'an object' if isinstance(value, dict) else 'a list'}, not one value")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    check_unicode(text)
    return text or None


def check_unicode(text: str) -> None:
    """Raises `BadCell` if a text is not valid Unicode."""
    if half := _SURROGATE.search(text):
        is_byte = "\udc80" <= half[0] <= "\udcff"
        raise BadCell("is not UTF-8; convert it" if is_byte else f"holds half a character ({ascii(half[0])[1:-1]})")


def as_caption(value: Any) -> str | None:
    """A cell as text; a list of captions gives the first one."""
    return as_text(value[0] if isinstance(value, list) and value else value)


def as_seconds(value: Any) -> float | None:
    """A cell as a time in seconds from the first frame; None if it is empty or null.

    Raises:
        BadCell: the cell is not such a time.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise BadCell(f"is {str(value)[:40]!r}; it must be a number of seconds, at least 0")
    return seconds


def metadata_json(values: Mapping[str, Any]) -> str | None:
    """A JSON object of these values; None without values.

    Values that JSON cannot hold are converted: NaN and infinities to null, lone surrogates to U+FFFD, bytes and dates
    to text.

    Raises:
        BadCell: lists are nested too deeply, or a number has too many digits, for Python.
    """
    try:
        return json.dumps(_plain(values), sort_keys=True, default=str, allow_nan=False) if values else None
    except RecursionError as error:
        raise BadCell("is nested too deeply") from error
    except ValueError as error:
        raise BadCell(f"cannot be written as JSON ({error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
