"""Commands that examine data and settings: ``verify``, ``inspect``, ``config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from clipmill.cli.app import Assignments, ConfigFiles, app
from clipmill.config import json_schema, load_config, markdown

if TYPE_CHECKING:
    from clipmill.shards.verify import VerifyReport

PANEL = "Look at data and settings"

Target = Annotated[str, typer.Argument(help="A data set's folder, or the root of a run.", show_default=False)]


@app.command("verify", rich_help_panel=PANEL)
def verify(
    url: Target,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every sample.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild damaged clip units from the videos.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove orphans older than the grace period.")] = False,
    grace_seconds: Annotated[
        float, typer.Option(help="Keep orphans younger than this; a writer may still need them.")
    ] = 86400,
    config: ConfigFiles = None,
) -> None:
    """Check the shards of a data set, or of a whole run, against their commits and manifests.

    --repair uses the config.yaml that the run has recorded, unless --config names another config.
    """
    from clipmill import stages
    from clipmill.shards.prune import prune as prune_orphans
    from clipmill.shards.verify import verify as verify_dataset

    reports = {dataset_url: verify_dataset(dataset_url, deep) for dataset_url in stages.find_datasets(url)}
    damaged = {dataset_url: report.damaged_units for dataset_url, report in reports.items() if report.needs_repair}
    if repair and damaged:
        stages.repair(url, damaged, load_config(config) if config else None)
        reports |= {dataset_url: verify_dataset(dataset_url, deep) for dataset_url in damaged}
    for dataset_url, report in reports.items():
        removed = prune_orphans(dataset_url, report.orphans, grace_seconds) if prune else []
        _print_report(dataset_url, report, removed)
        if report.needs_repair:
            print(f"  {stages.way_back(dataset_url)}")
    if any(report.problems for report in reports.values()):
        raise typer.Exit(1)


def _print_report(url: str, report: VerifyReport, removed: list[str]) -> None:
    print(
        f"{'whole' if not report.problems else 'DAMAGED'}: {url}: {report.num_units} units, "
        f"{report.num_shards} shards, {report.num_samples} samples, {report.num_bytes:,} bytes"
    )
    for problem in report.problems:
        print(f"  {problem}")
    for orphan in report.orphans:
        print(f"  orphan {'removed' if orphan in removed else 'left by a writer that did not finish'}: {orphan}")


@app.command("inspect", rich_help_panel=PANEL)
def inspect(
    url: Target,
    sheet: Annotated[str, typer.Option(help="Where to write the contact sheet: a path or URL.")] = "contact-sheet.png",
    duplicates: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Find near-duplicates among the clips of tokens instead, and write the superfluous ones to FILE, "
            "which data.exclude takes.",
        ),
    ] = None,
) -> None:
    """Show the content of a data set: counts, classes, durations, and a contact sheet; or list its near-duplicates."""
    from clipmill import stages, storage
    from clipmill.pipeline.inspect import inspect as describe

    found = stages.find_datasets(url)
    if duplicates is not None:
        from clipmill.pipeline.duplicates import write_duplicates

        tokens = [dataset_url for dataset_url in found if Path(dataset_url).parent.name == "tokens"]
        print(yaml.safe_dump(write_duplicates(tokens, storage.absolute(duplicates)), sort_keys=False), end="")
        return
    clips = [dataset_url for dataset_url in found if Path(dataset_url).parent.name == "clips"]
    pictures = []
    for dataset_url in clips or found:
        facts = describe(dataset_url)
        pictures.append(facts.pop("contact_sheet"))
        print(yaml.safe_dump({dataset_url: facts}, sort_keys=False), end="")
    if pictures[0] is not None:
        storage.publish_bytes(storage.absolute(sheet), pictures[0])
        print(f"contact sheet: {sheet}")


@app.command("config", rich_help_panel=PANEL)
def show_config(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of config files instead, for editors.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print the reference of all keys instead (docs/configuration.md).")
    ] = False,
) -> None:
    """Print the resolved configuration."""
    if schema:
        print(json.dumps(json_schema(), indent=2))
    elif reference:
        print(markdown(), end="")
    else:
        run = load_config(config or [], assignments or [])
        print(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), end="")
