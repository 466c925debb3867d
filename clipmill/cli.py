"""The command line: parsing and printing only."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from clipmill.config import RunConfig, load_config
from clipmill.errors import ClipmillError, Interrupted

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="VideoGPT at cluster scale: raw videos become a trained video generator.",
)

ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--config", "-c", help="YAML file; several merge left to right.")
]
Assignments = Annotated[list[str] | None, typer.Argument(help="section.key=value, over the files.", show_default=False)]
Target = Annotated[str, typer.Argument(help="A data set's folder, or the root of a run.")]


def _stage_command(name: str, help_text: str) -> None:
    @app.command(name, help=help_text)
    def command(assignments: Assignments = None, config: ConfigFiles = None) -> None:
        from clipmill import stages

        summary = stages.run_stage(name, load_config(config or [], assignments or []))
        if summary is not None:
            print(json.dumps({key: value for key, value in summary.items() if key != "versions"}))


_stage_command("shard", "Raw videos -> clip shards.")
_stage_command("train-vqvae", "Clip shards -> tokenizer (VQ-VAE).")
_stage_command("tokenize", "Clip shards + tokenizer -> token shards.")
_stage_command("train-prior", "Token shards -> prior (GPT).")
_stage_command("sample", "Prior -> videos.")
_stage_command("evaluate", "Judge reconstructions, prior and samples.")
_stage_command("report", "Write report/index.html.")


@app.command("demo")
def demo(assignments: Assignments = None, config: ConfigFiles = None) -> None:
    """Make a small data set of moving shapes and run every stage on it, on this machine."""
    from clipmill import stages
    from clipmill.demo import generate

    run = load_config(config or [Path("configs/demo.yaml")], assignments or [])
    generate(run.data.source.url, seed=run.seed)
    _print_table(run, stages.run_all(run))


def _print_table(run: RunConfig, summaries: dict[str, dict[str, Any] | None]) -> None:
    table = Table("stage", "seconds", "result", title=f"run {run.root}")
    for name, summary in summaries.items():
        if summary is None:
            table.add_row(name, "-", "nothing to do")
            continue
        facts = {
            key: value
            for key, value in summary.items()
            if key not in ("stage", "seconds", "schema") and isinstance(value, int | float | str)
        }
        shown = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        table.add_row(name, f"{summary['seconds']:.1f}", shown)
    console = Console()
    console.print(table)
    console.print(f"report: {run.folder('report', 'index.html')}", soft_wrap=True)


@app.command("config")
def show_config(assignments: Assignments = None, config: ConfigFiles = None) -> None:
    """Print the resolved configuration."""
    run = load_config(config or [], assignments or [])
    print(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), end="")


@app.command("submit")
def submit(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Jobs of the file (none: all), and section.key=value for all of them.", show_default=False),
    ] = None,
    jobs: Annotated[Path, typer.Option("--jobs", help="The jobs and what each needs.")] = Path("ray_jobs.yaml"),
    address: Annotated[
        str | None, typer.Option(help="http://HOST:8265; none: RAY_ADDRESS, else this machine's.")
    ] = None,
) -> None:
    """Submit jobs and what they need to a Ray cluster, in order, and wait for them."""
    from clipmill.cluster import jobs as ray_jobs

    chosen = [name for name in names or [] if "=" not in name]
    ray_jobs.submit(jobs, chosen, address, [name for name in names or [] if "=" in name])


@app.command("verify")
def verify(
    url: Target,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every sample.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove orphans older than the grace period.")] = False,
    grace_seconds: Annotated[float, typer.Option(help="Age below which an orphan may still be in the making.")] = 86400,
) -> None:
    """Check the shards of a data set, or of a whole run, against their commits and manifests."""
    from clipmill import stages
    from clipmill.shards.verify import prune as prune_orphans
    from clipmill.shards.verify import verify as verify_dataset

    sound = True
    for dataset_url in stages.find_datasets(url):
        report = verify_dataset(dataset_url, deep)
        removed = prune_orphans(dataset_url, report.orphans, grace_seconds) if prune else []
        print(
            f"{'whole' if not report.problems else 'DAMAGED'}: {dataset_url}: {report.num_units} units, "
            f"{report.num_shards} shards, {report.num_samples} samples, {report.num_bytes:,} bytes"
        )
        for problem in report.problems:
            print(f"  {problem}")
        for orphan in report.orphans:
            print(f"  orphan {'removed' if orphan in removed else 'left by a writer that did not finish'}: {orphan}")
        sound = sound and not report.problems
    if not sound:
        raise typer.Exit(1)


@app.command("inspect")
def inspect(
    url: Target,
    sheet: Annotated[Path, typer.Option(help="Where to write the contact sheet.")] = Path("contact-sheet.png"),
) -> None:
    """Show what is in a data set: numbers, classes, durations, and a contact sheet."""
    from clipmill import stages
    from clipmill.pipeline.inspect import inspect as describe

    found = stages.find_datasets(url)
    clips = [dataset_url for dataset_url in found if Path(dataset_url).parent.name == "clips"]
    pictures = []
    for dataset_url in clips or found:
        facts = describe(dataset_url)
        pictures.append(facts.pop("contact_sheet"))
        print(yaml.safe_dump({dataset_url: facts}, sort_keys=False), end="")
    if pictures[0] is not None:
        sheet.write_bytes(pictures[0])
        print(f"contact sheet: {sheet}")


def main() -> None:
    """Entry point of the console script: maps errors to exit statuses (see docs/design.md)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("DeepSpeed", "ray", "httpx", "botocore", "s3fs"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        app()
    except ClipmillError as error:
        print(f"clipmill: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM and Ctrl-C outside the parts of a stage that end in an order of their own.

    Not an `Exception`: code that expects anything of a damaged file must not take it for the damage.
    """
    print("clipmill: stopped; run the same command to go on", file=sys.stderr)
    raise SystemExit(Interrupted.exit_status)


if __name__ == "__main__":
    main()
