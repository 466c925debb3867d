"""The command line: parsing and printing only."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.table import Table

from clipmill.config import RunConfig, load_config
from clipmill.errors import ClipmillError, Interrupted, UserError

if TYPE_CHECKING:
    from clipmill.shards.verify import VerifyReport

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
        _run_stage(name, assignments, config)


def _training_command(name: str, section: str, help_text: str) -> None:
    @app.command(name, help=help_text)
    def command(
        assignments: Assignments = None,
        config: ConfigFiles = None,
        accept_new_dataset: Annotated[
            bool, typer.Option("--accept-new-dataset", help="Go on over another data set, at the start of an epoch.")
        ] = False,
    ) -> None:
        accepted = [f"{section}.training.accept_new_dataset=true"] if accept_new_dataset else []
        _run_stage(name, [*(assignments or []), *accepted], config)


def _run_stage(name: str, assignments: list[str] | None, config: list[Path] | None, more: str | None = None) -> None:
    from clipmill import stages

    _print_summary(stages.run_stage(name, load_config(config or [], assignments or []), more))


def _print_summary(summary: dict[str, Any] | None) -> None:
    if summary is not None:
        print(json.dumps({key: value for key, value in summary.items() if key != "versions"}))


@app.command("shard")
def shard(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="List the source again; add videos not planned yet.")
    ] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try the videos in quarantine again.")
    ] = False,
) -> None:
    """Raw videos -> clip shards."""
    if extend and retry_quarantined:
        raise UserError("--extend and --retry-quarantined are two generations; run one after the other")
    _run_stage("shard", assignments, config, "listed" if extend else "retried" if retry_quarantined else None)


_training_command("train-vqvae", "vqvae", "Clip shards -> tokenizer (VQ-VAE).")
_stage_command("tokenize", "Clip shards + tokenizer -> token shards.")
_training_command("train-prior", "prior", "Token shards -> prior (GPT).")
_stage_command("sample", "Prior -> videos.")


@app.command("evaluate")
def evaluate(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    what: Annotated[
        Literal["all", "vqvae"] | None,
        typer.Option("--what", help="vqvae: the tokenizer alone, right after train-vqvae.", show_default="all"),
    ] = None,
) -> None:
    """Judge reconstructions, prior and samples."""
    from clipmill import stages
    from clipmill.evaluation.evaluate import read_result
    from clipmill.evaluation.table import circumstances, row_groups

    run = load_config(config or [], [*(assignments or []), *([f"evaluate.what={what}"] if what else [])])
    summary = stages.run_stage("evaluate", run)
    result = read_result(run)
    if result is not None:
        table = Table("", "", "", title=circumstances(result), show_header=False)
        for rows in row_groups(result):
            for row in rows:
                table.add_row(*row)
            table.add_section()
        Console().print(table)
    _print_summary(summary)


_stage_command("report", "Write report/index.html.")


@app.command("demo")
def demo(assignments: Assignments = None, config: ConfigFiles = None) -> None:
    """Make a small data set of moving shapes and run every stage on it, on this machine."""
    from clipmill import stages
    from clipmill.demo import generate, video_size

    run = load_config(config or [Path("configs/demo.yaml")], assignments or [])
    generate(run.data.source.url, seed=run.seed, size=video_size(run.data.clip.size))
    _print_table(run, stages.run_all(run))


@app.command("moving-mnist")
def moving_mnist(
    digits: Annotated[
        Path, typer.Argument(help="MNIST's train-images-idx3-ubyte (.gz), or .npy or .npz.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(help="The .npy file to write: uint8 [20, N, 64, 64].", show_default=False)],
    videos: Annotated[int, typer.Option("--videos", min=1, help="In the file.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the digits and how they move.")] = 0,
) -> None:
    """Make Moving MNIST: two digits that bounce, in the published file's layout."""
    from clipmill.moving_mnist import generate, read_digits

    generate(read_digits(digits), out, num_videos=videos, seed=seed)


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


@app.command("import-videogpt")
def import_videogpt(
    checkpoint: Annotated[
        Path, typer.Argument(help="A file that the published VideoGPT code wrote.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", help="Training folder for the export, such as runs/bair/vqvae.")],
) -> None:
    """Turn a published VideoGPT checkpoint (VQ-VAE or prior) into an export."""
    from clipmill import storage
    from clipmill.models.videogpt import import_videogpt as make_export

    kind, sha8 = make_export(checkpoint, storage.absolute(out))
    print(json.dumps({"kind": kind, "export": storage.join(out, "exports", sha8)}))


@app.command("export")
def export(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    stage: Annotated[Literal["vqvae", "prior"], typer.Option("--stage", help="Which model.")] = "prior",
    step: Annotated[int | None, typer.Option("--step", min=1, help="Of the checkpoint; none: the newest.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the weights in the export.")
    ] = "float32",
) -> None:
    """Turn a committed checkpoint into an export, the latest of its folder."""
    from clipmill import stages

    url = stages.export_model(f"train-{stage}", load_config(config or [], assignments or []), step, dtype)
    print(json.dumps({"kind": stage, "export": url}))


@app.command("generate")
def generate(
    model: Annotated[
        str, typer.Argument(help="An export of a prior, its training folder, or a run.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", help="The .mp4 file to write.")],
    num: Annotated[int, typer.Option("--num", min=1, help="Videos; several become a grid.")] = 1,
    label: Annotated[str | None, typer.Option("--label", help="Class; by default all in turn.")] = None,
    first_frame: Annotated[
        str | None, typer.Option("--first-frame", help="A picture or video to go on from, or to condition on.")
    ] = None,
    condition: Annotated[
        str | None, typer.Option("--condition", help="A .npy file of actions or of a text's embedding.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.001, help="Length; by default the prior's window.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", min=0.1, help="Frames per second; by default the training clips', else 8.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.")] = 0,
    temperature: Annotated[float, typer.Option("--temperature", help="Below 1: more likely codes.")] = 1.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw from the k most likely codes.")] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from codes of this probability.")] = 1.0,
) -> None:
    """Export of a prior -> an mp4 file; no data set, no Ray."""
    from clipmill.api.command import generate_file

    facts = generate_file(
        model,
        out,
        num=num,
        label=label,
        first_frame=first_frame,
        condition=condition,
        seconds=seconds,
        fps=fps,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    print(json.dumps(facts))


@app.command("config")
def show_config(assignments: Assignments = None, config: ConfigFiles = None) -> None:
    """Print the resolved configuration."""
    run = load_config(config or [], assignments or [])
    print(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), end="")


@app.command("estimate")
def estimate(
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs to train the prior on.")],
    assignments: Assignments = None,
    config: ConfigFiles = None,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak FLOP/s that is reached.")] = 0.4,
    peak_tflops: Annotated[
        float, typer.Option(min=0.001, help="Dense peak of one GPU (H100 in bfloat16: 989).")
    ] = 989.0,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    upload_mb_per_second: Annotated[float, typer.Option(min=0.001, help="Of one node, 10^6 bytes.")] = 200.0,
) -> None:
    """What training the prior of a config will take: memory of a GPU, tokens a day, bytes on disk."""
    from clipmill.training.estimate import estimate as estimate_prior

    result = estimate_prior(
        load_config(config or [], assignments or []),
        gpus,
        mfu=mfu,
        peak_tflops=peak_tflops,
        gpus_per_node=gpus_per_node,
        upload_mb_per_second=upload_mb_per_second,
    )
    gib = 2**30
    parts = ("weights", "gradients", "optimizer", "buffers")
    heads = ("ZeRO", "weights", "grads", "optim.", "buffers", "activations", "total", "remade")  # 80 columns hold them
    table = Table(
        *heads,
        caption="remade: the total with every block's activations made again",
        title=f"{result.num_parameters:,} parameters on {gpus} GPUs: GiB of one GPU",
    )
    for stage, memory in enumerate(result.states):
        totals = (memory.total + result.activations, memory.total + result.checkpointed_activations)
        cells = [getattr(memory, part) for part in parts] + [result.activations, *totals]
        table.add_row(str(stage), *(f"{cell / gib:.2f}" for cell in cells))
    Console().print(table)
    print(f"micro-batch: {result.rows} clips of {result.tokens_per_clip:,} tokens, {result.accumulation} a step")
    print(f"tokens a day: {result.tokens_per_day:.3g} at an MFU of {mfu:.0%} of {peak_tflops:g} TFLOP/s a GPU")
    print(f"token shards: {result.token_bytes_per_clip * 1e6 / gib:.2f} GiB a million clips")
    print(f"checkpoint: {result.checkpoint_bytes / gib:.2f} GiB, uploaded in {result.upload_seconds:.0f} s")


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
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged clip units again from the videos.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove orphans older than the grace period.")] = False,
    grace_seconds: Annotated[float, typer.Option(help="Age below which an orphan may still be in the making.")] = 86400,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="Of the run to repair; none: its own config.yaml.")
    ] = None,
) -> None:
    """Check the shards of a data set, or of a whole run, against their commits and manifests."""
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
