"""Commands to watch and stop a run: ``status``, ``logs``, ``stop``. They need its storage alone."""

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
"""How long one look at a run waits for its storage."""

Root = Annotated[str, typer.Argument(help="The root of a run.", show_default=False)]
StageName = Annotated[str, typer.Argument(help="Such as train-prior; sample/NAME for a set of samples.")]


@app.command("status", rich_help_panel=PANEL)
def status(
    root: Root,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every 10 s.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document for programs.")] = False,
) -> None:
    """Show the stages of a run, from its storage alone."""
    if as_json:
        stages = [dataclasses.asdict(one) | {"record": one.record and one.record.model_dump()} for one in _look(root)]
        print(json.dumps({"root": storage.shown(root), "stages": stages}))
        return
    console = Console(highlight=False)
    shown = render(root, _look(root))
    if not watch:
        console.print(shown, soft_wrap=True)
    elif console.is_terminal:
        with Live(shown, console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for newer in _looks(root, shown):
                live.update(newer, refresh=True)
    else:
        console.print(shown, soft_wrap=True)
        for newer in _looks(root, shown):
            console.print(newer, soft_wrap=True)


def _looks(root: str, shown: Group) -> Iterator[Group]:
    """The status of a run again and again; while its storage is away, the last one with a line that says so."""
    while True:
        time.sleep(WATCH_SECONDS)
        try:
            shown = render(root, _look(root))
            yield shown
        except StorageUnavailable as error:
            yield Group(shown, Text(f"as of the last answer: {error}"))


def _look(root: str) -> list[run_status.StageStatus]:
    with storage.limit_retries(PATIENCE_SECONDS):
        return run_status.read_run(root)


@app.command("logs", rich_help_panel=PANEL)
def logs(
    root: Root,
    stage: StageName,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Of the stage; none: the newest.")] = None,
) -> None:
    """Print the log of a stage, from the storage of its run."""
    url = run_status.folder_of(root, stage)
    for line in run_status.read_log(url, attempt).splitlines():
        print(printable(line))


@app.command("stop", rich_help_panel=PANEL)
def stop(
    root: Root,
    stage: Annotated[str | None, typer.Argument(help="Such as train-prior.", show_default=False)] = None,
    gone: Annotated[
        bool, typer.Option("--gone", help="The cluster is lost: let the next run begin without watching for it.")
    ] = False,
) -> None:
    """Stop a stage in order, through the storage of its run."""
    if gone == (stage is not None):
        raise UserError("name the stage to stop, or give --gone for a run whose cluster is lost")
    if stage is not None:
        for line in run_status.stop(root, stage):
            print(line)
        return
    released = run_status.release_gone(root)
    print(f"released: {', '.join(released)}" if released else "no stage holds its folder")
