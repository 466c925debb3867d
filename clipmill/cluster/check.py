"""Checks the nodes of a cluster before stages run there: packages, Python, access to the root."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from clipmill import storage
from clipmill.cluster import connection
from clipmill.config import ClusterConfig
from clipmill.errors import ClipmillError
from clipmill.extras import installed_versions

__all__ = ["NodeReport", "check_nodes", "differences", "problems"]

NODE_SECONDS = 60.0
"""Time limit for all nodes together: a worker process has to start on each."""
STORAGE_SECONDS = 20.0
"""How long a node retries requests to storage that does not answer."""

logger = logging.getLogger(__name__)


class NodeReport(NamedTuple):
    """The result of the check on one node.

    Attributes:
        host: name of the node.
        versions: of Python, clipmill and its main packages.
        problem: why the node cannot run stages, in one line; None if no problem was found.
    """

    host: str
    versions: dict[str, str]
    problem: str | None


def check_nodes(root: str, config: ClusterConfig) -> list[NodeReport]:
    """Checks all living nodes of the cluster at the same time.

    Args:
        root: absolute URL of a run. Each node writes an object into it and removes it, and must see one that this
            process wrote.
        config: which cluster.

    Raises:
        UserError: this process cannot write to the root.
    """
    mark = storage.join(root, f"probe-{uuid.uuid4().hex}")
    with connection.connect(config), storage.disk_errors_explained(root), storage.limit_retries(STORAGE_SECONDS):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        storage.create_bytes(mark, b"clipmill")
        try:
            look = ray.remote(num_cpus=0, max_retries=0)(_look)
            environment = connection.worker_environment()
            asked = {
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                    root, mark, environment
                ): node.host
                for node in connection.living_nodes()
            }
            ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
            reports = [_read(ref, asked[ref]) for ref in ready]
            reports += [NodeReport(asked[ref], {}, f"no answer within {NODE_SECONDS:g} s") for ref in late]
            for ref in late:
                ray.cancel(ref, force=True)
        finally:
            storage.remove(mark)
    return sorted(reports)


def _look(root: str, mark: str, environment: dict[str, str]) -> tuple[str, dict[str, str], str | None]:
    """Checks the node on which it runs."""
    os.environ.update(environment)
    problem = None
    try:
        with storage.disk_errors_explained(root), storage.limit_retries(STORAGE_SECONDS):
            if not storage.exists(mark):
                problem = f"{storage.shown(root)} is not the head's folder; use one that all nodes share"
            elif storage.is_local(root):
                storage.create_bytes(own := storage.join(root, f"probe-{uuid.uuid4().hex}"), b"clipmill")
                storage.remove(own)
            else:
                storage.check_create(root)
    except (ClipmillError, OSError) as error:
        problem = str(error).splitlines()[0]
    return socket.gethostname(), installed_versions(), problem


def _read(ref: Any, host: str) -> NodeReport:
    import ray

    try:
        return NodeReport(*ray.get(ref))
    except ray.exceptions.RayError as error:  # such as: clipmill is not installed there
        return NodeReport(host, {}, connection.last_line(error))


def problems(reports: Sequence[NodeReport]) -> Iterator[str]:
    """A line for each node that cannot run stages."""
    return (f"{report.host}: {report.problem}" for report in reports if report.problem is not None)


def differences(reports: Sequence[NodeReport], local: dict[str, str]) -> Iterator[str]:
    """A line for each package whose version on a node differs from this machine's.

    Args:
        reports: of the nodes.
        local: versions on this machine; packages that are not installed here are ignored.
    """
    for name, version in local.items():
        others: dict[str, list[str]] = defaultdict(list)
        for report in reports:
            if report.versions and report.versions.get(name, "missing") != version:
                others[report.versions.get(name, "missing")].append(report.host)
        for other, hosts in sorted(others.items()):
            yield f"{name} is {version} here, {other} on {', '.join(sorted(set(hosts)))}"
