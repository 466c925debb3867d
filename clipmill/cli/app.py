"""The application object, and the arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmill import __version__
from clipmill.cli.completion import complete_assignment, complete_config

__all__ = ["Assignments", "ConfigFiles", "Json", "app"]

app = typer.Typer(
    name="clipmill",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="VideoGPT at cluster scale: raw videos become a trained video generator.",
    epilog="Start with `clipmill demo`, or with `clipmill init FOLDER_OF_VIDEOS`.",
)

ConfigFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML file, or the name of a shipped config such as demo; several merge left to right.",
        autocompletion=complete_config,
        show_default=False,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="section.key=value; overrides the config files.",
        autocompletion=complete_assignment,
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one line of JSON. Default if stdout is not a terminal.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"clipmill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `clipmill` itself."""
