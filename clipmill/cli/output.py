"""Results of commands: a readable summary on a terminal, otherwise one line of JSON."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipmill.config import RunConfig
from clipmill.progress import duration

__all__ = ["command_line", "print_facts", "print_next", "print_proposal", "print_run", "print_stage", "wants_json"]

_NOT_SHOWN = ("stage", "seconds", "schema", "versions")


def wants_json(as_json: bool) -> bool:
    """Whether a command prints its result as JSON: with ``--json``, or if stdout is not a terminal."""
    return as_json or not sys.stdout.isatty()


def command_line(command: str, config: Sequence[str] | None, assignments: Sequence[str] | None) -> str:
    """A command as a user would type it, with the given configs and assignments."""
    files = [word for file in config or () for word in ("--config", file)]
    return shlex.join(["clipmill", *command.split(), *files, *(assignments or ())])


def print_stage(
    name: str, summary: dict[str, Any] | None, folder_url: str, next_command: str | None, as_json: bool
) -> None:
    """Prints the result of a stage. As JSON: its summary, or nothing if the stage was already finished."""
    if wants_json(as_json):
        if summary is not None:
            print(json.dumps({key: value for key, value in summary.items() if key != "versions"}))
        return
    if summary is not None:
        print(f"{name}: done in {duration(summary['seconds'])}")
        _print_rows(_facts(summary))
    print(f"  {'output':<{_WIDTH}}  {folder_url}")
    if next_command is not None:
        print_next([next_command])


def print_run(
    run: RunConfig, summaries: dict[str, dict[str, Any] | None], next_commands: Iterable[str], as_json: bool
) -> None:
    """Prints the result of a whole run: a row for each stage, the report, and the next commands."""
    report = run.folder("report", "index.html")
    if as_json:
        print(json.dumps({"root": run.root, "report": report, "stages": summaries}))
        return
    table = Table("stage", "seconds", "result", title=f"run {run.root}")
    for name, summary in summaries.items():
        if summary is None:
            table.add_row(name, "-", "nothing to do")
        else:
            table.add_row(
                name, f"{summary['seconds']:.1f}", "  ".join(f"{key} {value}" for key, value in _facts(summary))
            )
    Console().print(table)
    print(f"report: {report}")
    print_next(next_commands)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Prints the result of a command that is not a stage."""
    if wants_json(as_json):
        print(json.dumps(facts))
    else:
        _print_rows(_facts(facts))


def print_proposal(facts: dict[str, Any], failures: Sequence[tuple[str, str]], other_files: str) -> None:
    """Prints what `clipmill init` found and wrote."""
    _print_rows([("config", facts["config"]), *_facts({key: facts[key] for key in facts if key != "config"})])
    for name, cause in failures[:3]:
        print(f"  {'':<{_WIDTH}}  {name}: {cause}")
    if other_files:
        _print_rows([("other files", other_files)])
    expected = facts["expected_seconds"]
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in expected.items())
    _print_rows([("expected time", f"{duration(sum(expected.values()))} ({stages})")])


def print_next(commands: Iterable[str]) -> None:
    """Prints the next commands. The first one activates the environment if the shell does not find `clipmill`."""
    print("next:")
    for command in (*_activation(), *commands):
        print(f"  {command}")


_WIDTH = 16


def _print_rows(rows: Iterable[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"  {name:<{_WIDTH}}  {value}")


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The plain values of a summary, as (name, value)."""
    return [
        (key.replace("_", " "), _shown(value))
        for key, value in summary.items()
        if key not in _NOT_SHOWN and isinstance(value, int | float | str)
    ]


def _shown(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _activation() -> list[str]:
    """The command that puts this environment's `clipmill` on the shell's path; empty if it is there already."""
    here = Path(sys.prefix) / "bin"
    found = shutil.which("clipmill")
    if (found is not None and Path(found).parent == here) or not (here / "activate").is_file():
        return []
    path = here / "activate"
    return [f"source {shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))}"]
