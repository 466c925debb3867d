"""Commands to start with: ``demo``, ``init``, ``run``, and the data set ``moving-mnist``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clipmill.cli.app import Assignments, ConfigFiles, app
from clipmill.cli.output import command_line, print_next, print_proposal, print_run
from clipmill.config import RunConfig, load_config

PANEL = "Start here"

JsonOnly = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]


@app.command("demo", rich_help_panel=PANEL)
def demo(assignments: Assignments = None, config: ConfigFiles = None, as_json: JsonOnly = False) -> None:
    """Generate a small data set of moving shapes and run every stage on it, on this machine.

    The default config is the shipped config demo. Use --config demo --config demo-wide for clips in 16:9.
    """
    from clipmill import stages
    from clipmill.demo import generate, video_size

    run = load_config(config or ["demo"], assignments or [])
    generate(run.data.source.url, seed=run.seed, size=video_size(run.data.clip.size))
    summaries = stages.run_all(run)
    print_run(run, summaries, [*_after_a_run(run), "clipmill init FOLDER_OF_YOUR_VIDEOS"], as_json)


@app.command("init", rich_help_panel=PANEL)
def init(
    videos: Annotated[
        str, typer.Argument(help="A folder of videos, a bucket prefix, or one video.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Config file to write; default: NAME.yaml, after the folder.")
    ] = None,
    root: Annotated[str | None, typer.Option("--root", help="Folder of the run; default: runs/NAME.")] = None,
    hours: Annotated[
        float | None,
        typer.Option("--hours", min=0.001, help="Hours for both trainings; default: 0.25 on CPUs, 4 on GPUs."),
    ] = None,
    as_json: JsonOnly = False,
) -> None:
    """Write a config for your own videos, with clips, models and steps that fit them and this machine."""
    from clipmill.init import propose

    proposal = propose(videos, out, root, hours)
    survey = proposal.survey
    facts = {
        "config": str(proposal.path),
        "root": proposal.root,
        "videos": survey.num_videos,
        "bytes": survey.num_bytes,
        "seconds_of_video": round(survey.total_seconds, 1),
        "opened": len(survey.opened),
        "unreadable": len(survey.failures),
        "clips": proposal.num_clips,
        "machine": str(proposal.machine),
        "expected_seconds": {name: round(seconds, 1) for name, seconds in proposal.stage_seconds.items()},
    }
    if as_json:
        print(json.dumps(facts))
        return
    print_proposal(facts, survey.failures, survey.other_files)
    print_next([command_line("run", [str(proposal.path)], None)])


@app.command("run", rich_help_panel=PANEL)
def run_all(assignments: Assignments = None, config: ConfigFiles = None, as_json: JsonOnly = False) -> None:
    """Run all stages of a config, from the videos to the report. Finished stages are skipped.

    Example: clipmill init /path/to/videos --out mine.yaml, then clipmill run --config mine.yaml
    """
    from clipmill import stages

    run = load_config(config or [], assignments or [])
    print_run(run, stages.run_all(run), _after_a_run(run), as_json)


def _after_a_run(run: RunConfig) -> list[str]:
    """Next commands after a finished run."""
    return [command_line(f"generate {run.root} --out new.mp4", None, None)]


@app.command("moving-mnist", rich_help_panel=PANEL)
def moving_mnist(
    digits: Annotated[
        Path, typer.Argument(help="MNIST's train-images-idx3-ubyte (.gz), or .npy or .npz.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(help="The .npy file to write: uint8 [20, N, 64, 64].", show_default=False)],
    videos: Annotated[int, typer.Option("--videos", min=1, help="Number of videos in the file.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the digits and their motion.")] = 0,
) -> None:
    """Generate Moving MNIST, two bouncing digits, in the layout of the published file."""
    from clipmill.moving_mnist import generate, read_digits

    generate(read_digits(digits), out, num_videos=videos, seed=seed)
