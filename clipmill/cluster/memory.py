"""How much memory a node has left; works inside a container too."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_share"]

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_share(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> float:
    """The free share of memory, of the machine or of our cgroup, whichever is smaller.

    1.0 if both are unknown: a worker must not wait for a value that cannot be measured.
    """
    return min(_machine_share(meminfo), _cgroup_share(cgroup))


def _machine_share(meminfo: Path) -> float:
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) / int(fields["MemTotal"].split()[0])
    except (OSError, KeyError, ValueError):
        return 1.0


def _cgroup_share(cgroup: Path) -> float:
    """Free share of memory by cgroup v2. It counts page cache as used, but inactive page cache is reclaimable."""
    try:
        limit = int((cgroup / "memory.max").read_text())  # the text "max" means no limit
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return 1 - (used - int(statistics["inactive_file"])) / limit
    except (OSError, KeyError, ValueError, ZeroDivisionError):
        return 1.0
