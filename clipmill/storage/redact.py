"""Credentials leave any text before others read it: logs, status documents, recorded configurations."""

from __future__ import annotations

import os
import re

from clipmill.storage.urls import shown

__all__ = ["is_secret_variable", "redacted"]

MIN_SECRET_LENGTH = 8
"""Shorter values of secret variables are left alone: ``test`` would be cut out of ordinary words."""
_SECRET_VARIABLE = re.compile(
    "SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|ACCOUNT_KEY|API_KEY|SAS|CONNECTION_STRING|CREDENTIALS", re.IGNORECASE
)
_PLACE_VARIABLE = re.compile("_(PATH|FILE|DIR|URL|URI|MODE|TYPE)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
"""Says where a secret lies, or of which kind it is, and is no secret."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _SECRET_VARIABLE.search(name) is not None and _PLACE_VARIABLE.search(name) is None


def redacted(text: str) -> str:
    """The text without the values of secret environment variables, and with its URLs as `shown` writes them."""
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and value in text and is_secret_variable(name):
            text = text.replace(value, "***")
    return _URL.sub(lambda found: shown(found[0]), text)
