"""Commands to watch and stop a run: ``status``, ``logs``, ``stop``. They only need the run's storage."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from clipmill import status as run_status
from clipmill import storage
from clipmill.cli.app import app
from clipmill.errors import StorageUnavailable, UserError
from clipmill.status.show import printable, render

PANEL = "Watch and stop a run"
WATCH_SECONDS = 10.0
PATIENCE_SECONDS = 15.0
"""How long one reading of the status retries its storage."""

Root = Annotated[str, typer.Argument(help="The root of a run.", show_default=False)]
StageName = Annotated[str, typer.Argument(help="A stage such as train-prior; sample/NAME for one of several sets.")]


@app.command("status", rich_help_panel=PANEL)
def status(
    root: Root,
    watch: Annotated[bool, typer.Option("--watch", help="Update every 10 s.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the state of a run's stages, read from its storage."""
    if as_json:
        stages = [
            dataclasses.asdict(one) | {"record": one.record and one.record.model_dump()} for one in _read_status(root)
        ]
        print(json.dumps({"root": storage.shown(root), "stages": stages}))
        return
    console = Console(highlight=False)
    shown = render(root, _read_status(root))
    if not watch:
        console.print(shown, soft_wrap=True)
    elif console.is_terminal:
        with Live(shown, console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for newer in _statuses(root, shown):
                live.update(newer, refresh=True)
    else:
        console.print(shown, soft_wrap=True)
        for newer in _statuses(root, shown):
            console.print(newer, soft_wrap=True)


def _statuses(root: str, shown: Group) -> Iterator[Group]:
    """Yields the status of a run periodically; while storage is unreachable, the last status with the error."""
    while True:
        time.sleep(WATCH_SECONDS)
        try:
            shown = render(root, _read_status(root))
            yield shown
        except StorageUnavailable as error:
            yield Group(shown, Text(f"this is the last known status: {error}"))


def _read_status(root: str) -> list[run_status.StageStatus]:
    with storage.limit_retries(PATIENCE_SECONDS):
        return run_status.read_run(root)


@app.command("logs", rich_help_panel=PANEL)
def logs(
    root: Root,
    stage: StageName,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, help="Attempt at the stage; default: the newest.")
    ] = None,
) -> None:
    """Print the log of a stage, read from the run's storage."""
    url = run_status.folder_of(root, stage)
    for line in run_status.read_log(url, attempt).splitlines():
        print(printable(line))


@app.command("stop", rich_help_panel=PANEL)
def stop(
    root: Root,
    stage: Annotated[str | None, typer.Argument(help="A stage such as train-prior.", show_default=False)] = None,
    gone: Annotated[
        bool, typer.Option("--gone", help="The cluster is lost: release its folders after 15 s, not 60 s.")
    ] = False,
) -> None:
    """Stop a stage cleanly, through the run's storage."""
    if gone == (stage is not None):
        raise UserError("name the stage to stop, or give --gone for a run whose cluster is lost")
    if stage is not None:
        for line in run_status.stop(root, stage):
            print(line)
        return
    released = run_status.release_gone(root)
    print(f"released: {', '.join(released)}" if released else "nothing to release: no stage holds its folder")
