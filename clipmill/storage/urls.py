r"""Names of objects: local paths and fsspec URLs.

A file name on a disk is bytes, and not always UTF-8, which all our formats are. Each byte that is not appears in a URL
as ``\x`` and two hex digits (``caf\xe9.mp4``); a backslash that could be mistaken for such a start appears as
``\x5c``. `local_path` turns a URL back into the name on the disk. A bucket's keys are UTF-8 already and stand in a URL
as they are, whatever they hold (``?``, ``#``, ``//``).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, unquote_plus

__all__ = [
    "WEB_SCHEMES",
    "absolute",
    "escape",
    "escape_name",
    "is_local",
    "is_web",
    "join",
    "local_path",
    "object_path",
    "relative_name",
    "request_url",
    "resolve",
    "scheme",
    "server",
    "shown",
    "split",
    "unescape",
]

WEB_SCHEMES = frozenset(("http", "https"))

_URL = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)")
"""Scheme and server. `urlsplit` would take ``a:b`` for a URL, and drop the newlines of a name."""
_LOCAL_URL = re.compile("(file|local):(?=/)(?://(?:localhost(?=/))?)?", re.IGNORECASE)
"""What stands before a path. RFC 8089 allows ``file:/path`` too; ``local://`` is fsspec's other name of ``file://``."""
_ESCAPE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
"""Stands for a byte that is not UTF-8, or for a backslash, in a name."""
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_HERE = "./"

_CREDENTIAL = re.compile(
    "x-amz-|x-goog-|awsaccesskeyid|googleaccessid|key-pair-id|policy|expires|sig|sign|hmac|token|secret|password|passwd|"
    "pwd|auth|credential|api[-_]?key|access[-_]?key|jwt|session|cookie|se$|sp$|sv$|sr$|skoid$|key$",
    re.IGNORECASE,
)
"""Starts, or contains, the name of a query parameter that signs a URL or lets its holder in."""
_SECRET_LENGTH = 32
"""Shortest value of any other parameter that is taken for a secret as well."""


def scheme(url: str) -> str:
    """The scheme of a URL in lower case; empty for a path."""
    found = _URL.match(url)
    return found[1].lower() if found else ""


def server(url: str) -> str:
    """The server or bucket of a URL; empty for a path."""
    found = _URL.match(url)
    return found[2] if found else ""


def is_local(url: str) -> bool:
    """Whether the URL names a place on this machine's file system."""
    return scheme(url) in ("", "file", "local")


def is_web(url: str) -> bool:
    """Whether the URL names a file on a web server."""
    return scheme(url) in WEB_SCHEMES


def local_path(url: str) -> Path:
    """The path of a local URL, as it is on the disk."""
    if not is_local(url):
        raise ValueError(f"{url} is not local")
    return Path(unescape(_path_of(url)))


def absolute(url: str) -> str:
    """The URL without trailing slash, local ones as absolute paths (workers start in other folders)."""
    if is_local(url):
        return escape(os.path.abspath(os.path.expanduser(_path_of(url))))
    # What follows a question mark may be a signature: it stays as it is.
    return _lower_scheme(url if is_web(url) and "?" in url else url.rstrip("/"))


def _lower_scheme(url: str) -> str:
    return scheme(url) + url[len(scheme(url)) :]


def _path_of(url: str) -> str:
    """The path of a local URL. In that of a ``file:`` URL ``%20`` is a space (RFC 8089)."""
    found = _LOCAL_URL.match(url)
    if found is None:
        return url
    path = url[found.end() :]
    return unquote(path, errors="surrogateescape") if found[1].lower() == "file" else path


def escape_name(name: str) -> str:
    """A name from the disk as a part of a URL."""
    return escape(_ESCAPE.sub(r"\\x5cx\1", name))


def unescape(name: str) -> str:
    """The name on the disk."""
    return _ESCAPE.sub(lambda found: "\\" if found[1] == "5c" else chr(0xDC00 + int(found[1], 16)), name)


def escape(name: str) -> str:
    """A name in which surrogates stand for bytes that are not UTF-8, as Python keeps them, as a part of a URL."""
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)


def join(url: str, *names: str) -> str:
    """Appends path segments."""
    return "/".join([url.rstrip("/"), *names])


def resolve(url: str, name: str) -> str:
    """A name relative to a folder's URL; an absolute path or URL as it is."""
    if name.startswith(_HERE):
        return join(url, object_path(name))
    if name.startswith("/") or _LOCAL_URL.match(name):
        return absolute(name)
    return _lower_scheme(name) if scheme(name) else join(url, name)


def split(url: str) -> tuple[str, str]:
    """The folder of a file, and the file's name in it; neither has the query of a web server's URL."""
    folder, _, name = (url.partition("?")[0] if is_web(url) else url).rpartition("/")
    return folder, name


def relative_name(path: str) -> str:
    """The path of an object below a folder, as a name that `resolve` finds there.

    Keys of a bucket may begin with a slash or look like a URL: these begin with ``./``.
    """
    is_plain = not (scheme(path) or path.startswith(("/", _HERE)) or _LOCAL_URL.match(path))
    return path if is_plain else _HERE + path


def object_path(name: str) -> str:
    """The path that a `relative_name` stands for."""
    return name.removeprefix(_HERE)


def request_url(url: str) -> str:
    """A web server's file as it goes over the wire.

    Characters that no URL may hold are percent-encoded, bytes of names in other encodings too. All others stay as they
    stand, for a signature may cover them. A fragment stays here.
    """
    head, slashes, rest = unescape(url).partition("://")
    host, slash, path = rest.partition("#")[0].partition("/")
    if not host.isascii():
        host = host.encode("idna").decode()
    path = quote(_STRAY_PERCENT.sub("%25", path), safe="%/:?[]@!$&'()*+,;=~", errors="surrogateescape")
    return head + slashes + host + slash + path


def shown(url: str) -> str:
    """A URL or name for whatever others read: logs, records, configurations.

    Credentials go: the user and password before a host, and values of a query that sign a URL or are as long as a
    secret. Characters that would not show, or would move the cursor, are escaped.
    """
    found = _URL.match(url)
    if found is not None:
        host = found[2].rpartition("@")[2]
        path, question, query = url[found.end() :].partition("?")
        if question and is_web(url):
            query = "&".join(map(_shown_parameter, query.split("&")))
        url = f"{found[1]}://{host}{path}{question}{query}"
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], url)


def _shown_parameter(parameter: str) -> str:
    name, equals, value = parameter.partition("=")
    is_secret = _CREDENTIAL.search(unquote_plus(name)) or len(value or name) >= _SECRET_LENGTH
    return f"{name if equals else ''}{equals}***" if is_secret else parameter
