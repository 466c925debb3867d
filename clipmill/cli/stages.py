"""The commands of the seven stages."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from clipmill.cli.app import Assignments, ConfigFiles, Json, app
from clipmill.cli.help import StageCommand
from clipmill.cli.output import command_line, print_stage
from clipmill.cli.results import print_evaluation
from clipmill.config import RunConfig, load_config

__all__ = ["PANEL"]

PANEL = "Stages, in the order of a run"

AcceptNewDataset = Annotated[
    bool,
    typer.Option("--accept-new-dataset", help="Allow resuming with another data set, from the start of an epoch."),
]


@app.command("shard", cls=StageCommand, rich_help_panel=PANEL)
def shard(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    extend: Annotated[bool, typer.Option("--extend", help="List the source again and add new videos.")] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Retry the quarantined videos.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Raw videos -> clip shards."""
    from clipmill.errors import UserError

    if extend and retry_quarantined:
        raise UserError("--extend and --retry-quarantined exclude each other; run one after the other")
    more = "listed" if extend else "retried" if retry_quarantined else None
    _run_stage("shard", assignments, config, as_json, more)


@app.command("train-vqvae", cls=StageCommand, rich_help_panel=PANEL)
def train_vqvae(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    accept_new_dataset: AcceptNewDataset = False,
    as_json: Json = False,
) -> None:
    """Clip shards -> tokenizer (VQ-VAE)."""
    accepted = ["vqvae.training.accept_new_dataset=true"] if accept_new_dataset else []
    _run_stage("train-vqvae", [*(assignments or []), *accepted], config, as_json)


@app.command("tokenize", cls=StageCommand, rich_help_panel=PANEL)
def tokenize(assignments: Assignments = None, config: ConfigFiles = None, as_json: Json = False) -> None:
    """Clip shards + tokenizer -> token shards."""
    _run_stage("tokenize", assignments, config, as_json)


@app.command("train-prior", cls=StageCommand, rich_help_panel=PANEL)
def train_prior(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    accept_new_dataset: AcceptNewDataset = False,
    as_json: Json = False,
) -> None:
    """Token shards -> prior (GPT)."""
    accepted = ["prior.training.accept_new_dataset=true"] if accept_new_dataset else []
    _run_stage("train-prior", [*(assignments or []), *accepted], config, as_json)


@app.command("sample", cls=StageCommand, rich_help_panel=PANEL)
def sample(assignments: Assignments = None, config: ConfigFiles = None, as_json: Json = False) -> None:
    """Prior -> videos."""
    _run_stage("sample", assignments, config, as_json)


@app.command("evaluate", cls=StageCommand, rich_help_panel=PANEL)
def evaluate(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    what: Annotated[
        Literal["all", "vqvae"] | None,
        typer.Option("--what", help="vqvae: only the tokenizer, right after train-vqvae.", show_default="all"),
    ] = None,
    sample_first: Annotated[
        bool, typer.Option("--sample", help="Run stage sample first, for samples that are missing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure reconstructions, prior and samples; results go to evaluation/NAME/."""
    from clipmill import stages

    words = [*(assignments or []), *([f"evaluate.what={what}"] if what else [])]
    if sample_first:
        stages.run_stage("sample", load_config(config or [], words))
    _run_stage("evaluate", words, config, as_json)


@app.command("report", cls=StageCommand, rich_help_panel=PANEL)
def report(assignments: Assignments = None, config: ConfigFiles = None, as_json: Json = False) -> None:
    """Results of a run -> report/index.html."""
    _run_stage("report", assignments, config, as_json)


def _run_stage(
    name: str, assignments: list[str] | None, config: list[str] | None, as_json: bool, more: str | None = None
) -> None:
    from clipmill import stages

    run = load_config(config or [], assignments or [])
    summary = stages.run_stage(name, run, more)
    if name == "evaluate" and not as_json:
        _print_numbers(run)
    names = list(stages.STAGES)
    next_names = names[names.index(name) + 1 :][:1]
    next_command = command_line(next_names[0], config, assignments) if next_names else None
    print_stage(name, summary, stages.STAGES[name].module.folder_url(run), next_command, as_json)


def _print_numbers(run: RunConfig) -> None:
    """Prints the metrics of an evaluation as a table."""
    from clipmill.evaluation.results import folder_url, read_evaluation

    found = read_evaluation(folder_url(run))
    if found is not None:
        print_evaluation(found)
