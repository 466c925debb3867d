"""Lists the packages that each part of clipmill needs, for slim images. The plain install has all of them.

``python -m clipmill.extras train report`` prints the requirements of these parts and of the core, one per line::

    pip install --no-deps clipmill
    python -m clipmill.extras train > requirements.txt
    pip install -r requirements.txt

docs/install.md says which command needs which part. This module and ``clipmill/__init__.py`` import only the standard
library.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys

from clipmill import __version__

__all__ = ["EXTRAS", "explain_missing", "installed_versions", "requirements"]

EXTRAS: dict[str, tuple[str, ...]] = {
    "sources": ("av", "decord", "google.protobuf", "google_crc32c", "h5py", "PIL", "pyarrow"),
    "cluster": ("ray",),
    "train": ("torch", "deepspeed", "safetensors", "tensorboard"),
    "report": ("torchmetrics", "jinja2"),
}
"""The modules that each extra installs."""

_EXTRA = re.compile(r"""(?:\s+and\s+)?extra\s*==\s*['"]([\w-]+)['"]""")


def installed_versions() -> dict[str, str]:
    """Versions of clipmill, Python, and the installed packages that affect the results of a run."""
    versions = {"clipmill": __version__, "python": platform.python_version()}
    for name in ("torch", "ray", "deepspeed", "webdataset", "av", "decord", "decord2", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a GPU machine that only trains lacks some
            continue
    return versions


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Says which extra to install for a missing module; None if no extra of clipmill installs it."""
    name = error.name or ""
    for extra, modules in EXTRAS.items():
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            return (
                f"this needs the package {name.partition('.')[0]}; install the extra: pip install 'clipmill[{extra}]'"
            )
    return None


def requirements(extras: list[str]) -> list[str]:
    """Requirements of the core and of the given extras, in the format of a requirements file.

    Raises:
        ValueError: an extra is unknown.
    """
    if unknown := set(extras) - EXTRAS.keys():
        raise ValueError(f"unknown extra {', '.join(sorted(unknown))}; known: {', '.join(EXTRAS)}")
    of_extras: dict[str, list[str]] = {name: [] for name in EXTRAS}
    plain: list[str] = []
    for line in importlib.metadata.requires("clipmill") or ():
        found = _EXTRA.search(line)
        if found is None:
            plain.append(line)
        elif found[1] in of_extras:
            of_extras[found[1]].append(_EXTRA.sub("", line).strip(" ;"))
    optional = {_name_of(line) for lines in of_extras.values() for line in lines}
    core = [line for line in plain if _name_of(line) not in optional]
    return sorted({*core, *(line for name in extras for line in of_extras[name])})


def _name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def main() -> None:
    """Prints the requirements of the extras given on the command line."""
    try:
        print("\n".join(requirements(sys.argv[1:])))
    except ValueError as error:
        print(f"clipmill: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
