"""The only door to storage: local folders and buckets through one small set of whole-object operations.

A URL is a local path (``runs/demo``) or an fsspec URL (``s3://bucket/runs/bair``). Objects appear whole or not at all:
a local file is written beside its target, synced, renamed, and its folder synced; a bucket object is one put of a
finished local file. Nothing is ever streamed into its final name, because fsspec publishes a partial object when an
exception leaves ``with fs.open(url, "wb")``.
"""

from clipmill.storage.disk import TEMPORARY_PREFIX, disk_errors_explained, unusable
from clipmill.storage.documents import create_document, publish_document, read_document
from clipmill.storage.entry import Entry, Limits
from clipmill.storage.failures import Refused, ServerLost, Unreadable
from clipmill.storage.objects import (
    check_create,
    create_bytes,
    exists,
    fetch,
    list_folder,
    list_folders,
    open_to_read,
    publish_bytes,
    publish_file,
    read_bytes,
    read_start,
    remove,
    remove_tree,
    stat,
    walk,
)
from clipmill.storage.places import places_environment, set_places
from clipmill.storage.redact import is_secret_variable, redacted
from clipmill.storage.retries import limit_retries
from clipmill.storage.urls import (
    absolute,
    escape,
    escape_name,
    is_local,
    is_web,
    join,
    local_path,
    resolve,
    server,
    shown,
    split,
)

__all__ = [
    "TEMPORARY_PREFIX",
    "Entry",
    "Limits",
    "Refused",
    "ServerLost",
    "Unreadable",
    "absolute",
    "check_create",
    "create_bytes",
    "create_document",
    "disk_errors_explained",
    "escape",
    "escape_name",
    "exists",
    "fetch",
    "is_local",
    "is_secret_variable",
    "is_web",
    "join",
    "list_folder",
    "list_folders",
    "local_path",
    "open_to_read",
    "places_environment",
    "publish_bytes",
    "publish_document",
    "publish_file",
    "read_bytes",
    "read_document",
    "read_start",
    "redacted",
    "remove",
    "remove_tree",
    "resolve",
    "server",
    "set_places",
    "shown",
    "split",
    "stat",
    "unusable",
    "walk",
    "limit_retries",
]
