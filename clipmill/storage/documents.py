"""JSON documents, each with its schema version."""

from __future__ import annotations

import json
import math
from typing import Any

from clipmill.errors import DamagedDocument, UserError
from clipmill.storage.objects import create_bytes, publish_bytes, read_bytes

__all__ = ["create_document", "publish_document", "read_document"]


def publish_document(url: str, body: dict[str, Any], schema: int) -> None:
    """Writes a JSON document (sorted keys) with its schema version; numbers that are not finite become null."""
    publish_bytes(url, _document_bytes(body, schema))


def create_document(url: str, body: dict[str, Any], schema: int) -> bool:
    """Like `publish_document`, but only if none exists. Returns whether it was written."""
    return create_bytes(url, _document_bytes(body, schema))


def _document_bytes(body: dict[str, Any], schema: int) -> bytes:
    document = {"schema": schema, **_finite(body)}
    return (json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """The value with null for each number that is not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_document(url: str, newest_schema: int) -> dict[str, Any]:
    """Reads a JSON document.

    Raises:
        FileNotFoundError: the document does not exist.
        DamagedDocument: it is not a document that clipmill writes.
        UserError: its schema is newer than ``newest_schema``.
    """
    content = read_bytes(url)  # outside the try: an error of the storage client does not mean a damaged document
    try:
        document = json.loads(content)
        schema = document["schema"]
        if type(schema) is not int:
            raise ValueError(f"schema {schema!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedDocument(f"{url} is damaged or was not written by clipmill; restore it from a copy") from error
    if schema > newest_schema:
        raise UserError(
            f"{url} has schema {schema}, this clipmill reads up to {newest_schema}; upgrade clipmill to read it"
        )
    return document
