"""Removes credentials from text that others read: logs, status documents, recorded configs."""

from __future__ import annotations

import os
import re

from clipmill.storage.urls import shown

__all__ = ["is_secret_variable", "redacted"]

MIN_SECRET_LENGTH = 8
"""Shorter values of secret variables are not redacted: a value like ``test`` occurs in ordinary words."""
_SECRET_VARIABLE = re.compile(
    "SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|ACCOUNT_KEY|API_KEY|SAS|CONNECTION_STRING|CREDENTIALS", re.IGNORECASE
)
_PLACE_VARIABLE = re.compile("_(PATH|FILE|DIR|URL|URI|MODE|TYPE)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
"""Names of variables that hold the place or the kind of a secret, not the secret itself."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _SECRET_VARIABLE.search(name) is not None and _PLACE_VARIABLE.search(name) is None


def redacted(text: str) -> str:
    """The text with the values of secret environment variables replaced by ``***`` and its URLs written by `shown`."""
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and value in text and is_secret_variable(name):
            text = text.replace(value, "***")
    return _URL.sub(lambda found: shown(found[0]), text)
