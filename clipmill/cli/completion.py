"""Shell completion: names of shipped configs, YAML files, and keys with their defaults."""

from __future__ import annotations

import json
from pathlib import Path

from clipmill.config import schema_keys, shipped_configs

__all__ = ["complete_assignment", "complete_config"]


def complete_config(incomplete: str) -> list[str]:
    """Completes names of shipped configs, and paths of YAML files and folders."""
    names = [name for name in shipped_configs() if name.startswith(incomplete)]
    folder, _, start = incomplete.rpartition("/")
    parent = Path(folder or ("/" if incomplete.startswith("/") else "."))
    prefix = incomplete[: len(incomplete) - len(start)]
    entries = sorted(parent.iterdir()) if parent.is_dir() else []
    folders = [f"{prefix}{entry.name}/" for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    files = [f"{prefix}{entry.name}" for entry in entries if entry.suffix in (".yaml", ".yml")]
    return names + [path for path in folders + files if path.startswith(incomplete)]


def complete_assignment(incomplete: str) -> list[str]:
    """Completes keys, as ``key=default``."""
    return [
        f"{key.path}={json.dumps(key.default, separators=(',', ':')) if key.has_default else ''}"
        for key in schema_keys()
        if key.path.startswith(incomplete)
    ]
