"""Commands that compare results: ``runs``, ``compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from clipmill.cli.app import app

if TYPE_CHECKING:
    from clipmill.evaluation.results import Evaluation

__all__ = ["print_evaluation"]

PANEL = "Compare results"

_MIB = 2**20


@app.command("runs", rich_help_panel=PANEL)
def runs(
    urls: Annotated[list[str], typer.Argument(help="Roots of runs, or folders of them.", show_default=False)],
) -> None:
    """Compare runs: their steps, evaluations and metrics, and the settings that differ."""
    from clipmill.evaluation.runs import differences, find_runs
    from clipmill.evaluation.table import short

    found = find_runs(urls)
    heads = ("run", "MiB", "steps", "evaluation", "made", "clips", "NMSE", "nats", "samples", "motion", "FVD")
    table = Table(*heads, caption="steps: tokenizer + prior; motion: motion energy of samples / of real clips")
    for run in found:
        steps = " + ".join(short(run.steps[name]) for name in ("tokenizer", "prior") if name in run.steps)
        names = [run.name, short(run.num_bytes // _MIB), steps or "-"]
        for cells in [_cells(evaluation) for evaluation in run.evaluations] or [["none yet"]]:
            table.add_row(*names, *cells)
            names = [""] * len(names)
        table.add_section()
    console = Console()
    console.print(table)
    differing = differences(found)
    if differing:
        table = Table("setting", *(run.name for run in found), title="Settings that differ")
        for key, values in differing.items():
            table.add_row(key, *map(str, values))
        console.print(table)


def _cells(evaluation: Evaluation) -> list[str]:
    from clipmill.evaluation.table import short

    metrics = evaluation.metrics
    samples, fvd = metrics.get("samples"), metrics["fvd"] or {}
    return [
        evaluation.name,
        evaluation.made["at"].replace("T", " ").removesuffix("Z"),
        short(metrics["clips"]["num_clips"]),
        short(metrics["reconstruction"]["nmse"]),
        short(metrics["prior"]["val_nats_per_token"]) if samples else "",
        short(samples["count"]) if samples else "",
        short(samples["appearance"]["ratio"]["motion_energy"]) if samples else "",
        short(fvd["fvd"]) if "fvd" in fvd else "",
    ]


@app.command("compare", rich_help_panel=PANEL)
def compare(
    urls: Annotated[
        list[str],
        typer.Argument(help="Evaluations, such as runs/demo/evaluation/default; the first is the reference."),
    ],
    out: Annotated[str, typer.Option("--out", help="The HTML page to write.")] = "compare.html",
) -> None:
    """Compare evaluations on one page: metrics, curves, and samples from the same noise."""
    from clipmill import storage
    from clipmill.errors import UserError
    from clipmill.evaluation.compare import compare as write_page
    from clipmill.evaluation.compare import find_evaluation

    if len(urls) < 2:
        raise UserError("compare needs at least two evaluations; `clipmill runs URL` lists those of a run")
    storage.publish_bytes(storage.absolute(out), write_page([find_evaluation(url) for url in urls]))
    print(f"page: {out}")


def print_evaluation(evaluation: Evaluation) -> None:
    """Prints all metrics of an evaluation as a table."""
    from clipmill.evaluation.table import circumstances, row_groups

    title = f"{evaluation.name}: {circumstances(evaluation.metrics)}"
    table = Table("", "", "", title=title, show_header=False)
    for rows in row_groups(evaluation.metrics):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    Console().print(table)
