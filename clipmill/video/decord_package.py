"""The package that provides the module ``decord``: optional, since only ``data.decoder=decord`` needs it.

Without importing it: it maps an FFmpeg of its own into memory.
"""

from __future__ import annotations

from importlib import metadata, util

from clipmill.errors import UserError

__all__ = ["decord_version"]

_DISTRIBUTIONS = ("decord", "decord2")
"""Both provide the module ``decord``. decord has wheels for x86_64, decord2 has them for aarch64 too."""


def decord_version() -> dict[str, str]:
    """The installed distribution's name and version, such as ``{"decord2": "3.4.0"}``.

    Raises:
        UserError: none is installed.
    """
    if util.find_spec("decord") is None:
        raise UserError(
            "data.decoder=decord needs the package decord (decord2 on aarch64), which is not installed; install it "
            "or set data.decoder=auto"
        )
    for name in _DISTRIBUTIONS:
        try:
            return {name: metadata.version(name)}
        except metadata.PackageNotFoundError:
            continue
    return {"decord": "unknown"}  # built from source, and on the path without metadata
