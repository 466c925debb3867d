"""Fan-outs over a cluster of two nodes, in a process of its own: ``python two_nodes.py``.

Prints a JSON document: for each scenario, which units were done where, what was raised, and what was logged.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.cluster_utils import Cluster

from clipmill.cluster import fan_out
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError, UserError

Work = Callable[[int], dict[str, Any]]


def make_worker(head: str, what: str) -> Work:
    """A worker that fails, in one way or another, on the node that is not the head."""
    is_head = ray.get_runtime_context().get_node_id() == head
    if what == "no library" and not is_head:
        raise UserError("data.decoder=decord, which is not installed: pip install decord")
    if what == "broken library" and not is_head:
        raise ImportError("libx.so: cannot open shared object file")

    def work(unit: int) -> dict[str, Any]:
        time.sleep(0.3 if is_head else 0.1)
        if what == "full disk" and not is_head:
            raise OSError(28, "No space left on device")
        if what == "no route" and not is_head:
            raise UserError("no such bucket; name another")
        if what == "user error":
            raise UserError("no such folder; name another")
        return {"where": "head" if is_head else "other"}

    return work


def run(cluster: Cluster, what: str, num_units: int, **keys: Any) -> dict[str, Any]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("clipmill").addHandler(handler)
    done: dict[int, str] = {}
    error = None
    config = ClusterConfig(address=cluster.address, max_failures=1, **keys)
    head = ray.get_runtime_context().get_node_id()
    try:
        fan_out(
            make_worker,
            (head, what),
            range(num_units),
            config=config,
            on_result=lambda unit, result: done.update({unit: result["where"]}),
        )
    except ClipmillError as caught:
        error = f"{type(caught).__name__}: {caught}"
    logging.getLogger("clipmill").removeHandler(handler)
    return {"done": done, "error": error, "lines": lines}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    results = {
        what: run(cluster, what, num_units)
        for what, num_units in {
            "full disk": 40,
            "no route": 40,
            "no library": 40,
            "broken library": 40,
            "user error": 40,
        }.items()
    }
    results["spare head"] = run(cluster, "healthy", 6, spare_head=True)
    print(json.dumps(results))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
