"""Fan-outs over a cluster of two nodes, in a process of its own: ``python two_nodes.py``.

However long a worker takes to start, both nodes take part: the first workers wait for each other, and the units of the
head take their time until the verdict on the other node is known.

Prints a JSON document: for each scenario, which units were done where, what was raised, and what was logged.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from clipmill.cluster import fan_out
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, UserError

Work = Callable[[int], dict[str, Any]]

NUM_UNITS = 400
START_SECONDS = 120
VERDICT = "verdict"


def make_worker(head: str, what: str, folder: Path) -> Work:
    """A worker that fails, in one way or another, on the node that is not the head.

    Args:
        head: id of that node.
        what: scenario.
        folder: of the scenario; `VERDICT` lies there once a node is known to be sick.
    """
    is_head = ray.get_runtime_context().get_node_id() == head
    if what != "healthy":
        wait_for_both(folder, is_head)
    if what == "no library" and not is_head:
        raise UserError("data.decoder=decord, which is not installed: pip install decord")
    if what == "broken library" and not is_head:
        raise ImportError("libx.so: cannot open shared object file")

    def work(unit: int) -> dict[str, Any]:
        time.sleep(0.3 if is_head and not (folder / VERDICT).exists() else 0.01)
        if what == "full disk" and not is_head:
            raise OSError(28, "No space left on device")
        if what == "no route" and not is_head:
            raise UserError("no such bucket; name another")
        if what == "user error":
            raise UserError("no such folder; name another")
        return {"where": "head" if is_head else "other"}

    return work


def wait_for_both(folder: Path, is_head: bool) -> None:
    """Returns once a worker has been made on each node."""
    (folder / ("head" if is_head else "other")).touch()
    deadline = time.monotonic() + START_SECONDS
    while not (folder / ("other" if is_head else "head")).exists():
        if time.monotonic() > deadline:
            raise TimeoutError("no worker starts on the other node")
        time.sleep(0.05)


def run(cluster: Cluster, what: str, num_units: int, **keys: Any) -> dict[str, Any]:
    lines: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="two-nodes-"))

    def note(record: logging.LogRecord) -> None:
        lines.append(record.getMessage())
        if "gets no more units" in lines[-1]:
            (folder / VERDICT).touch()

    handler = logging.Handler()
    handler.emit = note  # type: ignore[method-assign]
    logging.getLogger("clipmill").addHandler(handler)
    done: dict[int, str] = {}
    error = None
    config = ClusterConfig(address=cluster.address, max_failures=1, **keys)
    head = ray.get_runtime_context().get_node_id()
    try:
        fan_out(
            make_worker,
            (head, what, folder),
            range(num_units),
            config=config,
            on_result=lambda unit, result: done.update({unit: result["where"]}),
        )
    except ClipmillError as caught:
        error = f"{type(caught).__name__}: {caught}"
    logging.getLogger("clipmill").removeHandler(handler)
    shutil.rmtree(folder, ignore_errors=True)
    return {"num_units": num_units, "done": done, "error": error, "lines": lines}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    results = {
        what: run(cluster, what, NUM_UNITS)
        for what in ("full disk", "no route", "no library", "broken library", "user error")
    }
    results["spare head"] = run(cluster, "healthy", 6, spare_head=True)
    print(json.dumps(results))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
