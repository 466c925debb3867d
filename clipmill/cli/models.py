"""Commands that use, convert and plan models: ``generate``, ``export``, ``import-videogpt``, ``estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from clipmill.cli.app import Assignments, ConfigFiles, Json, app
from clipmill.cli.output import print_facts
from clipmill.config import load_config

if TYPE_CHECKING:
    from clipmill.training.estimate import Estimate

PANEL = "Use and move models"


@app.command("generate", rich_help_panel=PANEL)
def generate(
    model: Annotated[
        str, typer.Argument(help="URL of a prior's export, its training folder, or a run.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", help="The .mp4 file to write.")],
    num: Annotated[int, typer.Option("--num", min=1, help="Number of videos; several are tiled in a grid.")] = 1,
    label: Annotated[str | None, typer.Option("--label", help="Class; default: all classes in rotation.")] = None,
    first_frame: Annotated[
        str | None, typer.Option("--first-frame", help="Picture or video to continue, or to condition on.")
    ] = None,
    condition: Annotated[
        str | None, typer.Option("--condition", help=".npy file of actions or of a text embedding.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.001, help="Length; default: the prior's window.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", min=0.1, help="Frames per second; default: as the training clips, or 8.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Softmax temperature; below 1 favours likely codes.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Keep the k most likely codes; default: all.")
    ] = None,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Keep the most likely codes up to this total probability; 1 keeps all.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Generate an mp4 file with an exported prior; needs no data set and no Ray."""
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
    print_facts(facts, as_json)


@app.command("export", rich_help_panel=PANEL)
def export(
    assignments: Assignments = None,
    config: ConfigFiles = None,
    stage: Annotated[Literal["vqvae", "prior"], typer.Option("--stage", help="Which model.")] = "prior",
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="Step of the checkpoint; default: the newest.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="Dtype of the exported weights.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Export a committed checkpoint; it becomes the newest export of its folder."""
    from clipmill import stages

    url = stages.export_model(f"train-{stage}", load_config(config or [], assignments or []), step, dtype)
    print_facts({"kind": stage, "export": url}, as_json)


@app.command("import-videogpt", rich_help_panel=PANEL)
def import_videogpt(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint file of the published VideoGPT code.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", help="Training folder for the export, such as runs/bair/prior.")],
    tokenizer_out: Annotated[
        str | None,
        typer.Option("--tokenizer-out", help="Training folder for a prior's VQ-VAE; default: vqvae beside --out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a published VideoGPT checkpoint (a VQ-VAE, or a prior with its VQ-VAE) to exports."""
    from clipmill import storage
    from clipmill.models.videogpt import import_videogpt as make_exports
    from clipmill.models.videogpt import tokenizer_folder

    folder = storage.absolute(out)
    tokenizer = tokenizer_folder(folder) if tokenizer_out is None else storage.absolute(tokenizer_out)
    kind, sha8 = make_exports(checkpoint, folder, tokenizer)
    facts = {"kind": kind, "export": storage.join(out, "exports", sha8)}
    print_facts(facts | ({"tokenizer": tokenizer} if kind == "prior" else {}), as_json)


@app.command("estimate", rich_help_panel=PANEL)
def estimate(
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs to train on.")],
    assignments: Assignments = None,
    config: ConfigFiles = None,
    stage: Annotated[Literal["vqvae", "prior"], typer.Option("--stage", help="Which model.")] = "prior",
    memory_gib: Annotated[float, typer.Option(min=0.001, help="Memory of one GPU in GiB.")] = 80.0,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU hour; default: no costs shown.")] = None,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Model FLOP/s utilisation, a share of the peak.")] = 0.4,
    peak_tflops: Annotated[
        float, typer.Option(min=0.001, help="Dense peak of one GPU in TFLOP/s (H100 in bfloat16: 989).")
    ] = 989.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    upload_mb_per_second: Annotated[
        float, typer.Option(min=0.001, help="Upload rate of one node, in 10^6 bytes per second.")
    ] = 200.0,
) -> None:
    """Estimate a training's GPU memory, largest micro-batch, time, costs, and bytes on disk."""
    from clipmill.training.estimate import estimate as estimate_training

    result = estimate_training(
        load_config(config or [], assignments or []),
        gpus,
        mfu=mfu,
        peak_tflops=peak_tflops,
        gpus_per_node=gpus_per_node,
        upload_mb_per_second=upload_mb_per_second,
        memory_gib=memory_gib,
        stage=stage,
    )
    Console().print(_memory_table(result, gpus, stage))
    gib = 2**30
    print(f"micro-batch: {result.rows} clips of {result.tokens_per_clip:,} tokens, {result.accumulation} a step")
    fitting = ", ".join(f"{rows or 'none'} at stage {number}" for number, rows in enumerate(result.largest_rows))
    print(f"largest micro-batch in {memory_gib:g} GiB: {fitting}")
    print(f"tokens a day: {result.tokens_per_day:.3g} at an MFU of {mfu:.0%} of {peak_tflops:g} TFLOP/s a GPU")
    cost = "" if price is None else f", {result.hours * gpus * price:,.0f} at {price:g} a GPU hour"
    print(f"all steps: {result.hours:,.1f} hours, {result.hours * gpus:,.1f} GPU hours{cost}")
    print(f"token shards: {result.token_bytes_per_clip * 1e6 / gib:.2f} GiB a million clips")
    print(f"checkpoint: {result.checkpoint_bytes / gib:.2f} GiB, uploaded in {result.upload_seconds:.0f} s")


def _memory_table(result: Estimate, gpus: int, stage: str) -> Table:
    """Memory of one GPU by ZeRO stage, in 80 columns."""
    parts = ("weights", "gradients", "optimizer", "buffers")
    heads = ["ZeRO", "weights", "grads", "optim.", "buffers", "activations", "total"]
    recomputes = stage == "prior"  # the tokenizer has no activation checkpointing
    table = Table(
        *heads,
        *(["recomp."] if recomputes else []),
        caption="recomp.: the total with the activations of every block recomputed" if recomputes else None,
        title=f"{result.num_parameters:,} parameters on {gpus} GPUs: GiB of one GPU",
    )
    for zero_stage, memory in enumerate(result.states):
        kept = [result.activations, *([result.checkpointed_activations] if recomputes else [])]
        totals = [memory.total + activations for activations in kept]
        cells = [getattr(memory, part) for part in parts] + [result.activations, *totals]
        table.add_row(str(zero_stage), *(f"{cell / 2**30:.2f}" for cell in cells))
    return table
