"""Commands for a Ray cluster: ``submit``, ``check``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from clipmill import storage
from clipmill.cli.app import Assignments, ConfigFiles, Json, app
from clipmill.cli.output import wants_json
from clipmill.config import load_config
from clipmill.errors import UserError

PANEL = "On a cluster"


@app.command("submit", rich_help_panel=PANEL)
def submit(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of jobs (default: all jobs of the file), and section.key=value for all of them.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[Path, typer.Option("--jobs", help="File of jobs and their dependencies.")] = Path("ray_jobs.yaml"),
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", metavar="FILE", help="Replaces the jobs file's config.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="http://HOST:8265; default: RAY_ADDRESS, or else a prompt.", show_default=False),
    ] = None,
    follow: Annotated[
        bool | None,
        typer.Option("--follow/--no-follow", help="Print the log of the running job; default: only on a terminal."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the chain, its state, and what the nodes lack; submit no stage."),
    ] = False,
) -> None:
    """Submit jobs and their dependencies to a Ray cluster, in order, and wait for them."""
    from clipmill import cluster

    cluster.submit(
        jobs,
        [name for name in names or [] if "=" not in name],
        address,
        [name for name in names or [] if "=" in name],
        config=config or (),
        follow=sys.stdout.isatty() if follow is None else follow,
        dry_run=dry_run,
        since=_process_began(),
        confirm=typer.confirm if sys.stdin.isatty() else None,
    )


@app.command("check", rich_help_panel=PANEL)
def check(assignments: Assignments = None, config: ConfigFiles = None, as_json: Json = False) -> None:
    """Look at every node of a cluster: its packages, and whether it can write to the root. `submit` does it first."""
    from clipmill import cluster

    run = load_config(config or [], assignments or [])
    storage.set_places(run.storage)
    reports = cluster.check_nodes(storage.absolute(run.root), run.cluster)
    if wants_json(as_json):
        print(json.dumps([report._asdict() for report in reports]))
    else:
        for report in reports:
            print(f"{report.host}: {report.problem or 'fit'}")
            print("  " + ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    found = list(cluster.problems(reports))
    if len(found) == len(reports):
        raise UserError(f"no node can run stages; {found[0]}")


def _process_began() -> float:
    """Start time of this process in seconds since the epoch; another submit may end while Ray is imported."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
