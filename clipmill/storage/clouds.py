"""Azure through adlfs, Google through gcsfs: one attempt per request, and plain exceptions.

The retries of the SDKs are off, because `bucket.call` retries within one deadline. With both, it takes more than a
minute until an unreachable server is reported.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from clipmill.config.place import StoragePlace
from clipmill.storage.places import secret

__all__ = ["azure", "google"]

_AZURE_SECRETS = (
    *("account_name", "account_key", "connection_string", "sas_token"),
    *("client_id", "client_secret", "tenant_id"),
)
"""Options of adlfs. Their environment variables are the names in capitals, after ``AZURE_STORAGE_``."""


def azure(place: StoragePlace | None) -> Any:
    """A new client of Azure Blob Storage."""
    from adlfs import AzureBlobFileSystem

    # It logs each request with all headers: thousands of lines per stage.
    logging.getLogger("azure.core.pipeline.policies.http_logging_policy").setLevel(logging.WARNING)
    filesystem = AzureBlobFileSystem(use_listings_cache=False, skip_instance_cache=True, **_azure_options(place))
    # adlfs has no option for this. All clients of containers and blobs share the policy.
    policy = filesystem.service_client._config.retry_policy
    policy.total_retries = policy.connect_retries = policy.read_retries = policy.status_retries = 0
    return filesystem


def _azure_options(place: StoragePlace | None) -> dict[str, Any]:
    if place is None:
        return {}
    options: dict[str, Any] = {name: secret(place, f"AZURE_STORAGE_{name.upper()}") for name in _AZURE_SECRETS}
    options["account_name"] = place.account or options["account_name"]
    options["account_host"] = urlsplit(place.endpoint_url).netloc if place.endpoint_url else None
    options["anon"] = place.anonymous or None
    return {name: value for name, value in options.items() if value is not None}


def google(place: StoragePlace | None) -> Any:
    """A new client of Google Cloud Storage."""
    options: dict[str, Any] = {}
    if place is not None:
        token = "anon" if place.anonymous else secret(place, "GOOGLE_APPLICATION_CREDENTIALS")
        options = {"endpoint_url": place.endpoint_url, "project": place.project, "token": token}
    given = {name: value for name, value in options.items() if value is not None}
    return _one_attempt()(use_listings_cache=False, skip_instance_cache=True, **given)


@functools.cache
def _one_attempt() -> type[Any]:
    """Gcsfs without retries. (Its newer variant first asks for each bucket's type, which needs more permissions.)"""
    from gcsfs.core import GCSFileSystem

    class OneAttempt(GCSFileSystem):
        _request = _once(GCSFileSystem._request)
        _get_file_request = _once(GCSFileSystem._get_file_request)
        _get_file_concurrent = _once(GCSFileSystem._get_file_concurrent)

    return OneAttempt


def _once(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A method of gcsfs without retries, which raises PermissionError if access is denied."""
    inner = inspect.unwrap(function)

    @functools.wraps(inner)
    async def attempt(*arguments: Any, **options: Any) -> Any:
        try:
            return await inner(*arguments, **options)
        except OSError as error:
            if str(error).startswith("Forbidden: "):
                raise PermissionError(str(error).splitlines()[-1]) from error
            raise

    return attempt
