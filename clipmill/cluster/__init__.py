"""The only door to Ray: where work runs, never what it is.

``fan_out`` runs one function over many units on restartable actors, ``run_workers`` places and restarts the ranks
of one training run, ``connect`` opens the Ray they both use, ``submit`` hands whole stages to a remote cluster.
Importing this package does not import Ray: a machine without it can still run what needs no cluster.
"""

from __future__ import annotations

from clipmill.cluster.check import NodeReport, check_nodes, problems
from clipmill.cluster.fanout import fan_out
from clipmill.cluster.jobs import Job, JobsFile, in_order, load_jobs
from clipmill.cluster.launch import Report, connect, is_embedded, run_workers
from clipmill.cluster.submission import submit

__all__ = [
    "Job",
    "JobsFile",
    "NodeReport",
    "Report",
    "check_nodes",
    "connect",
    "fan_out",
    "in_order",
    "is_embedded",
    "load_jobs",
    "problems",
    "run_workers",
    "submit",
]
