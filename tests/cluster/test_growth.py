"""An autoscaling cluster grows for units that wait.

Ray's own ``AutoscalingCluster`` begins with ``ray stop``, which ends every Ray of the machine, and Ray's wheel lacks a
file that it needs. So this starts what it would start: a head with an autoscaler whose nodes are processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import START_SECONDS, environment
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKER_TYPE = {"resources": {"CPU": 1, "object_store_memory": 100 * 2**20}, "node_config": {}, "max_workers": 2}
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
HEAD_TYPE = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}


@pytest.fixture
def autoscaler(tmp_path: Path) -> Iterator[str]:
    """Address of a head of one CPU with an autoscaler that may add two nodes of one CPU."""
    address = f"127.0.0.2:{free_port('127.0.0.2')}"
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": address,
    }
    more = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    (config := tmp_path / "autoscaler.json").write_text(
        json.dumps(
            {
                "cluster_name": "test",
                "max_workers": 2,
                "provider": provider,
                "available_node_types": {"head": HEAD_TYPE, "worker": WORKER_TYPE},
                "head_node_type": "head",
                "upscaling_speed": 1.0,
                "idle_timeout_minutes": 5,
                **{"auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False},
                **{key: [] for key in COMMANDS},
            }
        )
    )
    host, _, port = address.rpartition(":")
    options = [f"--port={port}", f"--node-ip-address={host}", "--num-cpus=1", f"--object-store-memory={100 * 2**20}"]
    log = tmp_path / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"),
                *("start", "--head", "--block", "--include-dashboard=false", "--disable-usage-stats"),
                *(f"--autoscaling-config={config}", *options),
            ],
            stdout=output,
            stderr=output,
            env={**environment(), **more},
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
        head.wait()


def test_a_cluster_grows_for_waiting_units(autoscaler: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("driver.py")
    done = subprocess.run(
        [sys.executable, script, "grow", str(tmp_path / "nodes"), "30"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment(), "RAY_ADDRESS": autoscaler},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    nodes = (tmp_path / "nodes").read_text().splitlines()
    assert len(nodes) == 30
    counts = {kind: len({node for node in nodes if node.startswith(kind)}) for kind in ("head", "worker")}
    assert counts == {"head": 1, "worker": 2}
