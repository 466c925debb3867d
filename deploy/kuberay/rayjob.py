"""Prints one job of ray_jobs.yaml as a RayJob for KubeRay.

    python deploy/kuberay/rayjob.py shard root=s3://BUCKET/RUN | kubectl apply -f -

KubeRay submits it to the cluster of raycluster.yaml and does not retry it: it allows no ``backoffLimit`` on a cluster
that exists already. ``clipmill submit`` retries (rayjob.yaml).
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import yaml

from clipmill.cluster.jobs import JobsFile, in_order, load_jobs

JOBS = Path(__file__).resolve().parents[2] / "ray_jobs.yaml"


def main() -> None:
    """Prints the RayJob."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a job of the file")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the stage")
    parser.add_argument("--jobs", type=Path, default=JOBS, help="the jobs file")
    arguments = parser.parse_args()
    print(
        yaml.safe_dump(ray_job(load_jobs(arguments.jobs), arguments.name, arguments.overrides), sort_keys=False), end=""
    )


def ray_job(jobs_file: JobsFile, name: str, overrides: list[str]) -> dict[str, Any]:
    """The RayJob of one job, without what it needs.

    Args:
        jobs_file: a read ``ray_jobs.yaml``.
        name: a job of it.
        overrides: ``section.key=value``, appended to the entrypoint.
    """
    job = in_order(jobs_file.jobs, [name])[-1]
    runtime_env = (job.runtime_env or jobs_file.runtime_env).model_dump(exclude_defaults=True)
    # The image has the code and the configs in /app, so nothing is uploaded.
    runtime_env.pop("working_dir", None)
    runtime_env.pop("excludes", None)
    spec: dict[str, Any] = {
        "clusterSelector": {"ray.io/cluster": "clipmill"},
        "submissionMode": "HTTPMode",
        "entrypoint": " ".join(["cd /app &&", job.entrypoint, *map(shlex.quote, overrides)]),
        "runtimeEnvYAML": yaml.safe_dump(runtime_env, sort_keys=False),
    }
    if job.entrypoint_num_cpus is not None:
        spec["entrypointNumCpus"] = job.entrypoint_num_cpus
    if job.entrypoint_num_gpus is not None:
        spec["entrypointNumGpus"] = job.entrypoint_num_gpus
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": f"clipmill-{name}"},
        "spec": spec,
    }


if __name__ == "__main__":
    main()
