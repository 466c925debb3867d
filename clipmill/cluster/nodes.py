"""Which nodes are sick: those on which units fail that succeed elsewhere. No Ray in here; times are passed in.

The failure of a unit alone is no evidence: the cause may be the unit, the node, or the shared storage. It counts
against a node once the same unit has succeeded on another node. A node is sick once that has happened twice, with no
success of the node in between, and its second failure began after the first success elsewhere. An outage that affects
all nodes therefore excludes none of them, and neither does a unit that fails everywhere.

Until then, a node whose last units failed is a suspect. It gets one unit at a time, after growing pauses. Its newest
failed unit goes to another node next, so that the decision comes soon and few units fail.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

from clipmill.cluster.pauses import pause

__all__ = ["NodeWatch"]

NUM_PROOFS = 2
"""Number of units that fail on a node and succeed elsewhere, in the order described above, before it is sick."""
SUSPECT_FAILURES = 2
"""A single failed unit is no reason to slow a node down."""
HOPELESS_UNITS = 8
"""The stage ends once this many different units have failed in a row on every node."""
MAX_START_PAUSE_SECONDS = 300.0
"""Starting a worker may cost minutes of loading, so the pauses between failed starts grow longer."""

logger = logging.getLogger(__name__)


@dataclass
class _Record:
    """What is known about a node since a unit last succeeded on it, and a worker last started."""

    host: str
    failed: dict[int, float] = field(default_factory=dict)
    """Units that failed, and when their attempt began; in the order in which they failed."""
    failures: int = 0
    cause: str = ""
    paused_until: float = 0.0
    proofs: int = 0
    proven_at: float = float("-inf")
    failed_starts: int = 0
    start_paused_until: float = 0.0

    @property
    def is_suspect(self) -> bool:
        return self.failures >= SUSPECT_FAILURES

    def clear(self) -> None:
        """Forgets failed units after a success; failed starts of workers are counted separately."""
        self.failed = {}
        self.failures, self.paused_until = 0, 0.0
        self.proofs, self.proven_at = 0, float("-inf")


class NodeWatch:
    """The nodes on which workers were placed, by Ray's node id.

    Attributes:
        sick: ids of the nodes that get no more units.
    """

    def __init__(self) -> None:
        self.sick: set[str] = set()
        self._records: dict[str, _Record] = {}
        self._last_success = float("-inf")

    def add(self, node: str, host: str) -> None:
        """A worker was placed on a node."""
        self._records.setdefault(node, _Record(host))

    def name(self, node: str) -> str:
        """Host name and id, for messages."""
        return f"{self._records[node].host} ({node})"

    def succeeded(self, node: str, unit: int, now: float) -> None:
        """A unit succeeded on a node: this clears the node, and counts against nodes on which the unit failed."""
        self._last_success = now
        self._records[node].clear()
        for other, record in self._records.items():
            began = record.failed.get(unit)
            if other in self.sick or began is None or began < record.proven_at:
                continue
            record.proofs, record.proven_at = record.proofs + 1, now
            if record.proofs == NUM_PROOFS:
                self._condemn(other, f"units fail there that succeed elsewhere, at last: {record.cause}")

    def failed(self, node: str, unit: int, began: float, cause: str, now: float) -> None:
        """A unit, or the worker that had it, failed on a node."""
        record = self._records[node]
        record.failed.pop(unit, None)
        record.failed[unit] = began
        record.failures += 1
        record.cause = cause
        record.paused_until = now + pause(record.failures)

    def may_work(self, node: str, num_running: int, now: float) -> bool:
        """Whether a node that runs ``num_running`` units of ours gets another one."""
        record = self._records[node]
        return node not in self.sick and now >= record.paused_until and not (record.is_suspect and num_running)

    def is_suspect(self, node: str) -> bool:
        """Whether the last units of a node failed."""
        return self._records[node].is_suspect

    def trials(self) -> set[int]:
        """Units to try next on another node: the newest failed one of each suspect."""
        suspects = [record for node, record in self._records.items() if record.is_suspect and node not in self.sick]
        newest = {next(reversed(record.failed)) for record in suspects}
        # A unit that failed on several nodes is not evidence against any of them.
        return {unit for unit in newest if sum(unit in record.failed for record in self._records.values()) == 1}

    def start_failed(self, node: str, cause: str, now: float) -> None:
        """A worker could not start on a node."""
        record = self._records[node]
        record.failed_starts += 1
        record.cause = cause
        record.start_paused_until = now + pause(record.failed_starts, MAX_START_PAUSE_SECONDS)
        if record.failed_starts == 1:
            logger.warning("a worker could not start on %s: %s", self.name(node), cause)

    def started(self, node: str) -> None:
        """A worker started on a node."""
        record = self._records[node]
        record.failed_starts, record.start_paused_until = 0, 0.0

    def may_start(self, node: str, now: float) -> bool:
        """Whether it is time to try another start on a node."""
        return now >= self._records[node].start_paused_until

    def num_failed_starts(self, node: str) -> int:
        """Failed starts on a node since the last successful one."""
        return self._records[node].failed_starts

    def cannot_start(self, node: str) -> None:
        """Workers start elsewhere, but not on this node."""
        self._condemn(node, f"no worker can start there, at last: {self._records[node].cause}")

    def is_hopeless(self, alive: Collection[str], places: Collection[str]) -> bool:
        """Whether units fail one after the other on all living nodes that are not sick, without a success in between.

        Args:
            alive: the living nodes.
            places: nodes that work or may soon work; a node without a worker so far has not been tried.
        """
        if any(node not in self._records for node in places):
            return False
        records = [record for node, record in self._records.items() if node in alive and node not in self.sick]
        num_failed = [sum(began >= self._last_success for began in record.failed.values()) for record in records]
        return min(num_failed, default=0) >= HOPELESS_UNITS

    def _condemn(self, node: str, why: str) -> None:
        self.sick.add(node)
        logger.warning("node %s gets no more units: %s", self.name(node), why)
