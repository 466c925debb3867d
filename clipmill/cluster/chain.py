"""Checks the whole chain of jobs before any job is submitted: configs, credentials, resources."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipmill import storage
from clipmill.cluster.jobs import Job, in_order, load_jobs, submission_stem
from clipmill.cluster.server import Server, resources_text
from clipmill.config import RunConfig, load_config
from clipmill.errors import ClipmillError, UserError
from clipmill.status import folder_of
from clipmill.status.places import FOLDERS
from clipmill.status.read import read_stage

__all__ = ["PlannedJob", "describe", "plan_chain", "unmet_requests"]

LOOK_SECONDS = 10.0
"""How long a dry run waits for the storage of a run."""


class PlannedJob(NamedTuple):
    """A job as it will be submitted.

    Attributes:
        job: as in the jobs file.
        stem: beginning of its submission ids.
        entrypoint: with the assignments of this call.
        runtime_env: with an absolute working_dir.
        stage: of clipmill; None if the job runs something else.
        config: of the run; None if the job runs something else, or if only the cluster has the config file.
    """

    job: Job
    stem: str
    entrypoint: str
    runtime_env: dict[str, Any]
    stage: str | None
    config: RunConfig | None


def plan_chain(
    path: str | Path, names: Sequence[str], assignments: Sequence[str], config: Sequence[str]
) -> list[PlannedJob]:
    """The named jobs (all, if none is named) and the jobs they need, in order; see `submission.submit`.

    Raises:
        UserError: the file or the config of a stage is wrong, does not travel to the cluster, or holds credentials.
    """
    jobs_file = load_jobs(path, config)
    chain = []
    for job in in_order(jobs_file.jobs, names or [job.name for job in jobs_file.jobs]):
        entrypoint = " ".join([job.entrypoint, *map(shlex.quote, assignments)])
        if storage.redacted(entrypoint) != entrypoint:
            raise UserError(
                "an assignment holds credentials, which Ray would show in its dashboard; give them to the nodes"
            )
        runtime_env = (job.runtime_env or jobs_file.runtime_env).model_dump(exclude_defaults=True)
        if (folder := runtime_env.get("working_dir")) and "://" not in folder:
            runtime_env["working_dir"] = str(Path(path).resolve().parent / folder)
        stem = submission_stem(job, runtime_env, entrypoint)
        chain.append(PlannedJob(job, stem, entrypoint, runtime_env, *_stage_of(entrypoint, runtime_env)))
    return chain


def _stage_of(entrypoint: str, runtime_env: dict[str, Any]) -> tuple[str | None, RunConfig | None]:
    """The stage that an entrypoint runs, and its config as the cluster will read it."""
    words = shlex.split(entrypoint)
    if words[:1] != ["clipmill"] or len(words) < 2 or words[1] not in FOLDERS:
        return None, None
    files = [word for flag, word in itertools.pairwise(words) if flag in ("--config", "-c")]
    folder = runtime_env.get("working_dir")
    if folder is None or "://" in folder:  # the config comes with an image or a package
        return words[1], None
    found = [str(Path(folder, file)) if Path(folder, file).is_file() else file for file in files]
    outside = [
        file
        for file in found
        if Path(file).is_file() and not Path(file).resolve().is_relative_to(Path(folder).resolve())
    ]
    if outside:
        raise UserError(f"config {outside[0]} is not in {folder}, which is what travels to the cluster; copy it there")
    assignments = [word for word in words[2:] if "=" in word and not word.startswith("-") and word not in files]
    config = load_config(found, assignments)
    storage.set_places(config.storage)
    return words[1], config


def describe(chain: Sequence[PlannedJob], server: Server) -> Iterator[str]:
    """Lines for a dry run: each job's state, the resources it requests, and whether the cluster has them."""
    nodes = server.nodes()
    yield f"cluster at {server.client.get_address()}: {len(nodes)} nodes"
    for planned in chain:
        needs = f", after {', '.join(planned.job.needs)}" if planned.job.needs else ""
        yield f"{planned.job.name}{needs}: {planned.entrypoint}"
        if planned.stage is not None and planned.config is not None:
            yield f"  state: {_state(planned.config.root, planned.stage)}"
        for what, bundle, wanted in _requests(planned):
            held = sum(_num_held(node, bundle) for node in nodes)
            verdict = f"the cluster holds {held} when empty" if held else "NO NODE HOLDS ONE"
            yield f"  {what}: {wanted} x {resources_text(bundle)}; {verdict}"


def unmet_requests(chain: Sequence[PlannedJob], nodes: Sequence[dict[str, float]]) -> Iterator[str]:
    """A line for each request that no node can hold; no line if the nodes are unknown.

    Args:
        chain: what will be submitted.
        nodes: resources of each living node.
    """
    for planned in chain if nodes else ():
        for what, bundle, _ in _requests(planned):
            if not any(_num_held(node, bundle) for node in nodes):
                yield f"{planned.job.name}: no node holds {resources_text(bundle)} for its {what}; it will wait for one"


def _state(root: str, stage: str) -> str:
    try:
        with storage.limit_retries(LOOK_SECONDS):
            return read_stage(stage, folder_of(root, stage)).shown
    except (ClipmillError, OSError) as error:
        return f"unknown from here ({str(error).splitlines()[0]})"


def _requests(planned: PlannedJob) -> Iterator[tuple[str, dict[str, float], str]]:
    """The resources that a job requests: (for what, resources of one, how many)."""
    job, config = planned.job, planned.config
    driver = {"CPU": job.entrypoint_num_cpus or 0, "GPU": job.entrypoint_num_gpus or 0}
    driver |= {"memory": job.entrypoint_memory or 0, **(job.entrypoint_resources or {})}
    if any(driver.values()):
        yield "driver", driver, "1"
    if config is None or planned.stage not in ("shard", "tokenize", "sample", "train-vqvae", "train-prior"):
        return
    cluster = config.cluster
    gpu = {"GPU": 1.0} if cluster.use_gpu and planned.stage != "shard" else {}
    if planned.stage.startswith("train"):
        yield "workers", {"CPU": cluster.training_cpus or 1, **gpu}, str(cluster.training_workers)
    else:
        yield "workers", {"CPU": cluster.fanout_cpus, **gpu}, str(cluster.fanout_workers or "as many as fit")


def _num_held(node: dict[str, float], bundle: dict[str, float]) -> int:
    return int(min(node.get(name, 0) // amount for name, amount in bundle.items() if amount))
