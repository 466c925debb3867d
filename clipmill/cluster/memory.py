"""How much memory a node has left, seen from inside a container too."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_share"]

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_share(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> float:
    """The share of this node's memory that a new process can have: of the machine, or of our cgroup where that is less.

    1.0 where neither is known: whoever cannot measure must not wait.
    """
    return min(_machine_share(meminfo), _cgroup_share(cgroup))


def _machine_share(meminfo: Path) -> float:
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) / int(fields["MemTotal"].split()[0])
    except (OSError, KeyError, ValueError):
        return 1.0


def _cgroup_share(cgroup: Path) -> float:
    """Free share of memory by cgroup v2. The page cache counts as used there; inactive page cache is reclaimable."""
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max": no limit
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return 1 - (used - int(statistics["inactive_file"])) / limit
    except (OSError, KeyError, ValueError, ZeroDivisionError):
        return 1.0
