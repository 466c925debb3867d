"""Commands for a Ray cluster: ``submit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipmill.cli.app import app

PANEL = "On a cluster"


@app.command("submit", rich_help_panel=PANEL)
def submit(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Jobs of the file, by default all, and section.key=value for all of them.", show_default=False
        ),
    ] = None,
    jobs: Annotated[Path, typer.Option("--jobs", help="The jobs and what each needs.")] = Path("ray_jobs.yaml"),
    address: Annotated[
        str | None,
        typer.Option(help="http://HOST:8265; by default RAY_ADDRESS, else this machine's.", show_default=False),
    ] = None,
) -> None:
    """Submit jobs and what they need to a Ray cluster, in order, and wait for them."""
    from clipmill.cluster import jobs as ray_jobs

    chosen = [name for name in names or [] if "=" not in name]
    ray_jobs.submit(jobs, chosen, address, [name for name in names or [] if "=" in name])
