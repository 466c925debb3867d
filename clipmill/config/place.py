"""Section ``storage``: places that need other addresses or keys than the environment's defaults."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from clipmill.config.section import FREE, Section

__all__ = ["StoragePlace"]

_SECRET_KEY = re.compile("key|secret|token|passw|pwd|sas|connection_string|auth", re.IGNORECASE)


class StoragePlace(Section):
    """How one bucket, or a part of it, is reached: ``docs/storage.md``. Keys and passwords are never written here."""

    url: Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9+.-]*://"), FREE]
    """What lies below: ``s3://bucket``, ``s3://bucket/folder``, or ``s3://`` for all buckets. The longest one that fits
    a URL counts for it."""
    endpoint_url: Annotated[str | None, FREE] = None
    """Address of the server, such as ``https://s3.lab:9000``. None takes the environment's, else the
    provider's."""
    region: Annotated[str | None, FREE] = None
    """``s3://``: region. None takes that of the environment or profile."""
    profile: Annotated[str | None, FREE] = None
    """``s3://``: section of ``~/.aws/config`` and ``~/.aws/credentials`` on every node."""
    credentials: Annotated[str | None, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$"), FREE] = None
    """Prefix of the environment variables that hold the keys: with ``RAW_`` these are ``RAW_AWS_ACCESS_KEY_ID`` and so
    on. None takes those without a prefix."""
    account: Annotated[str | None, FREE] = None
    """``az://``: name of the storage account. None takes ``AZURE_STORAGE_ACCOUNT_NAME``."""
    project: Annotated[str | None, FREE] = None
    """``gs://``: project that pays for requests. None takes that of the credentials."""
    anonymous: Annotated[bool, FREE] = False
    """Sign no request: for public buckets."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_secrets(cls, values: Any) -> Any:
        """Refuses keys of secrets: a config is recorded beside its results, and sent to clusters in clear text."""
        if not isinstance(values, dict):
            return values
        if secret := sorted(name for name in values if name not in cls.model_fields and _SECRET_KEY.search(str(name))):
            raise ValueError(
                f"{', '.join(secret)}: a config holds no credentials; put them into the environment of the nodes (see "
                "credentials and profile), and remove them here"
            )
        return values

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if any("@" in urlsplit(address or "").netloc for address in (self.url, self.endpoint_url)):
            raise ValueError("an address holds a user or password; put them into the environment of the nodes")
        if sum((self.profile is not None, self.credentials is not None, self.anonymous)) > 1:
            raise ValueError("profile, credentials and anonymous exclude each other; keep one of them")
        return self
