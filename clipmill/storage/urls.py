r"""Names of objects: local paths and fsspec URLs.

All formats of clipmill are UTF-8, but a file name on a disk is bytes and may not be. In a URL, each byte that is not
UTF-8 is written as ``\x`` and two hex digits (``caf\xe9.mp4``), and a backslash that would look like such an escape is
written as ``\x5c``. `local_path` turns a URL back into the name on the disk. A bucket's keys are UTF-8 already; a URL
holds them unchanged, with any ``?``, ``#`` or ``//``.
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
    "provider",
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
_OTHER_NAMES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}

_URL = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)")
"""Scheme and server. `urlsplit` would take ``a:b`` for a URL, and drop the newlines of a name."""
_LOCAL_URL = re.compile("(file|local):(?=/)(?://(?:localhost(?=/))?)?", re.IGNORECASE)
"""The prefix of a local URL before its path. RFC 8089 allows ``file:/path`` too; ``local://`` is fsspec's other name of
``file://``.
"""
_ESCAPE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
"""The escape of a byte that is not UTF-8, or of a backslash."""
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_HERE = "./"

_CREDENTIAL = re.compile(
    "x-amz-|x-goog-|awsaccesskeyid|googleaccessid|key-pair-id|policy|expires|sig|sign|hmac|token|secret|password|passwd|"
    "pwd|auth|credential|api[-_]?key|access[-_]?key|jwt|session|cookie|se$|sp$|sv$|sr$|skoid$|key$",
    re.IGNORECASE,
)
"""Matches names of query parameters that sign a URL or grant access."""
_SECRET_LENGTH = 32
"""Values of other parameters that have at least this length are treated as secrets too."""


def scheme(url: str) -> str:
    """The scheme of a URL in lower case; empty for a path."""
    found = _URL.match(url)
    return found[1].lower() if found else ""


def provider(url: str) -> str:
    """The scheme of a URL by its usual name: ``s3``, ``gs``, ``az``."""
    return _OTHER_NAMES.get(scheme(url), scheme(url))


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
    """The path of a local URL, with the file name that the disk has."""
    if not is_local(url):
        raise ValueError(f"{url} is not local")
    return Path(unescape(_path_of(url)))


def absolute(url: str) -> str:
    """The URL without trailing slash. Local URLs become absolute paths, because workers start in other folders."""
    if is_local(url):
        return escape(os.path.abspath(os.path.expanduser(_path_of(url))))
    # The query may hold a signature, so it stays unchanged.
    return _lower_scheme(url if is_web(url) and "?" in url else url.rstrip("/"))


def _lower_scheme(url: str) -> str:
    return scheme(url) + url[len(scheme(url)) :]


def _path_of(url: str) -> str:
    """The path of a local URL. In a ``file:`` URL ``%20`` means a space (RFC 8089)."""
    found = _LOCAL_URL.match(url)
    if found is None:
        return url
    path = url[found.end() :]
    return unquote(path, errors="surrogateescape") if found[1].lower() == "file" else path


def escape_name(name: str) -> str:
    """A file name of the disk, escaped for use in a URL."""
    return escape(_ESCAPE.sub(r"\\x5cx\1", name))


def unescape(name: str) -> str:
    """Reverses `escape_name`: the file name on the disk."""
    return _ESCAPE.sub(lambda found: "\\" if found[1] == "5c" else chr(0xDC00 + int(found[1], 16)), name)


def escape(name: str) -> str:
    """Escapes the surrogates with which Python represents bytes that are not UTF-8."""
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)


def join(url: str, *names: str) -> str:
    """Appends path segments."""
    return "/".join([url.rstrip("/"), *names])


def resolve(url: str, name: str) -> str:
    """The URL of a name relative to a folder. An absolute path or URL is returned unchanged."""
    if name.startswith(_HERE):
        return join(url, object_path(name))
    if name.startswith("/") or _LOCAL_URL.match(name):
        return absolute(name)
    return _lower_scheme(name) if scheme(name) else join(url, name)


def split(url: str) -> tuple[str, str]:
    """A file's folder and its name in that folder, both without the query of a web URL."""
    folder, _, name = (url.partition("?")[0] if is_web(url) else url).rpartition("/")
    return folder, name


def relative_name(path: str) -> str:
    """The path of an object below a folder, as a name that `resolve` finds there.

    Keys of a bucket that begin with a slash or look like a URL get the prefix ``./``.
    """
    is_plain = not (scheme(path) or path.startswith(("/", _HERE)) or _LOCAL_URL.match(path))
    return path if is_plain else _HERE + path


def object_path(name: str) -> str:
    """Reverses `relative_name`: the path of the object."""
    return name.removeprefix(_HERE)


def request_url(url: str) -> str:
    """The URL of a web server's file as it is sent in a request.

    Characters that are not allowed in a URL, and bytes that are not UTF-8, are percent-encoded. All others stay
    unchanged, because a signature may cover them. The fragment is not sent.
    """
    head, slashes, rest = unescape(url).partition("://")
    host, slash, path = rest.partition("#")[0].partition("/")
    if not host.isascii():
        host = host.encode("idna").decode()
    path = quote(_STRAY_PERCENT.sub("%25", path), safe="%/:?[]@!$&'()*+,;=~", errors="surrogateescape")
    return head + slashes + host + slash + path


def shown(url: str) -> str:
    """A URL or name for texts that others read: logs, records, configs.

    Credentials are removed: user and password before the host, and query values that sign the URL or are long enough to
    be a secret. Characters that are invisible or move the cursor are escaped.
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
