"""Every file of deploy/ is valid to the tool that reads it, and agrees with ray_jobs.yaml and the pinned versions."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from clipmill.cluster.jobs import load_jobs
from clipmill.stages import STAGES
from tests.cluster.hosts import HEALTH_CHECKS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
BIN = Path(sys.executable).parent
JOBS = load_jobs(REPOSITORY / "ray_jobs.yaml")
STOP_WAIT_SECONDS = int(JOBS.runtime_env.env_vars["RAY_JOB_STOP_WAIT_TIME_S"])


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def pinned(package: str) -> str:
    found = re.search(rf"(?m)^{package}==(.+)$", (REPOSITORY / "constraints.txt").read_text())
    assert found
    return found[1]


def check_crd(document: Any, kind: str) -> None:
    schema = json.loads(gzip.decompress((SCHEMAS / f"{kind.lower()}.json.gz").read_bytes()))
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(document, schema)


def pod_groups(cluster: Any) -> list[Any]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def containers(cluster: Any) -> list[Any]:
    return [group["template"]["spec"]["containers"][0] for group in pod_groups(cluster)]


def test_raycluster_is_valid() -> None:
    check_crd(read("kuberay/raycluster.yaml"), "RayCluster")


def test_an_unknown_field_is_found() -> None:
    cluster = read("kuberay/raycluster.yaml")
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePolicy"):
        check_crd(cluster, "RayCluster")


def test_raycluster_fits_the_jobs() -> None:
    """The Ray of the pins, the grace period of the jobs, images that the Dockerfile builds, a head without workers."""
    cluster = read("kuberay/raycluster.yaml")
    assert cluster["spec"]["rayVersion"] == pinned("ray")
    graces = [group["template"]["spec"]["terminationGracePeriodSeconds"] for group in pod_groups(cluster)]
    head, cpu, gpu = graces
    assert head >= STOP_WAIT_SECONDS
    assert gpu >= STOP_WAIT_SECONDS
    assert cpu >= 15 + 10  # cluster.drain_seconds, and the removal of temporary files
    targets = re.findall(r"(?m)^FROM base AS (\w+)$", (DEPLOY / "Dockerfile").read_text())
    assert {container["image"] for container in containers(cluster)} == {f"clipmill:{target}" for target in targets}
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_secrets_come_from_a_secret_only() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix in {".yaml", ".sh", ".py", ""}:
            for line in path.read_text().splitlines():
                assert "SECRET_ACCESS_KEY" not in line or line.lstrip().startswith("#"), (path, line)


def test_rayjob_of_the_chain_is_valid_and_names_the_cluster() -> None:
    job = read("kuberay/rayjob.yaml")
    check_crd(job, "RayJob")
    cluster = read("kuberay/raycluster.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert "backoffLimit" not in job["spec"]  # KubeRay refuses it on an existing cluster


@pytest.mark.parametrize("name", [job.name for job in JOBS.jobs])
def test_rayjob_of_every_stage_is_valid(name: str) -> None:
    spec = importlib.util.spec_from_file_location("rayjob", DEPLOY / "kuberay" / "rayjob.py")
    assert spec
    assert spec.loader
    rayjob = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rayjob)
    job = rayjob.ray_job(JOBS, name, ["root=s3://b/a run"])
    check_crd(job, "RayJob")
    assert f"clipmill {name}" in job["spec"]["entrypoint"]
    assert job["spec"]["entrypoint"].endswith(" 'root=s3://b/a run'")
    assert "working_dir" not in yaml.safe_load(job["spec"]["runtimeEnvYAML"])


def test_jobs_cover_the_stages() -> None:
    assert [job.name for job in JOBS.jobs] == list(STAGES)


@pytest.mark.parametrize("name", ["aws", "gcp", "own-machines"])
def test_cluster_launcher_accepts(name: str) -> None:
    from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

    config = read(f"ray/{name}.yaml")
    prepared = prepare_config(config)
    validate_config(prepared)
    assert fillout_defaults(config)["cluster_name"] == "clipmill"
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert any("--head" in command and "--port=6379" in command for command in commands)
    assert any("--address=$RAY_HEAD_IP:6379" in command for command in commands)


def test_sky_task_is_valid() -> None:
    pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot")
    import sky

    task = sky.Task.from_yaml(str(DEPLOY / "sky.yaml"))
    assert task.num_nodes == 2
    assert any(resources.use_spot for resources in task.resources)


def shell_of_sky() -> str:
    task = read("sky.yaml")
    return f"{task['setup']}\n{task['run']}"


@pytest.mark.parametrize("name", ["slurm.sh", "sky.yaml"])
def test_shell_is_clean(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text("#!/usr/bin/env bash\n" + shell_of_sky() if name == "sky.yaml" else (DEPLOY / name).read_text())
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_asks_for_the_grace_period() -> None:
    text = (DEPLOY / "slurm.sh").read_text()
    directives = dict(re.findall(r"(?m)^#SBATCH --([a-z-]+)(?:=(\S+))?$", text))
    assert directives["signal"] == f"B:TERM@{STOP_WAIT_SECONDS}"
    assert {"requeue", "exclusive"} <= directives.keys()


STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> calls
case "$(basename "$0") $1" in
    "scontrol show") printf 'n1\\nn2\\n' ;;
    "clipmill stop") touch stop ;;
    "clipmill submit")
        touch submitted
        until [ -e stop ]; do sleep 0.05; done
        exit 76 ;;
esac
"""


def test_slurm_stops_the_stage_and_requeues_before_the_allocation_ends(tmp_path: Path) -> None:
    """Slurm cannot run here: stand-ins note how its commands, Ray and clipmill are called."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("scontrol", "srun", "ray", "clipmill"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    allocation = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", str(DEPLOY / "slurm.sh"), "root=/data/r", "seed=1"]
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **allocation}) as script:
        while not (tmp_path / "submitted").exists():
            assert script.poll() is None
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 76
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "clipmill submit --address http://n1:8265 root=/data/r seed=1" in calls
    assert calls[-2:] == ["clipmill stop /data/r", "scontrol requeue 7"]


def test_dockerfile_is_clean() -> None:
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_image_leaves_out_what_jobs_leave_out() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert set(JOBS.runtime_env.excludes) <= set(ignored)


def tool(name: str) -> str:
    found = shutil.which(name, path=str(BIN)) or shutil.which(name)
    assert found, f"{name} is not installed; it is one of the dev dependencies"
    return found


@pytest.mark.parametrize(
    "name", ["sky.yaml", "slurm.sh", "ray/aws.yaml", "ray/gcp.yaml", "ray/own-machines.yaml", "kuberay/raycluster.yaml"]
)
def test_a_head_notices_lost_hosts_soon(name: str) -> None:
    text = (DEPLOY / name).read_text()
    for variable, value in HEALTH_CHECKS.items():
        assert f"{variable}={value}" in text or f'name: {variable}, value: "{value}"' in text
    period, timeout, threshold = map(int, HEALTH_CHECKS.values())
    assert threshold * (period + timeout) <= 25_000
