from __future__ import annotations

from pathlib import Path

import pytest

from clipmill.cluster.memory import free_share


def test_the_tighter_of_machine_and_container_counts(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert free_share(meminfo, cgroup) == 1.0
    meminfo.write_text("MemTotal:  1000 kB\nMemFree:  100 kB\nMemAvailable:  600 kB\n")
    assert free_share(meminfo, cgroup) == pytest.approx(0.6)
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("900\n")
    (cgroup / "memory.stat").write_text("anon 700\ninactive_file 150\n")
    (cgroup / "memory.max").write_text("max\n")
    assert free_share(meminfo, cgroup) == pytest.approx(0.6)
    (cgroup / "memory.max").write_text("1000\n")
    assert free_share(meminfo, cgroup) == pytest.approx(0.25)


def test_this_machine_is_measured() -> None:
    assert 0 < free_share() < 1
