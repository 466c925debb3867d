"""Writes jobs files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_jobs(folder: Path, jobs: list[dict[str, Any]], **keys: Any) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "jobs": jobs, **keys}))
    return path


def job(name: str, *needs: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "entrypoint": f"echo {name}", "needs": list(needs), **keys}
