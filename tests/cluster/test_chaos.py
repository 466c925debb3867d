"""A stage on three hosts finishes although one has a full disk and another is preempted again and again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PREEMPTION_SECONDS = 60
"""How long a host works before it is preempted."""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system that holds a few small files more, as full disks do."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    (folder := tmp_path / "full").mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    (folder / "other-files").write_bytes(bytes(800_000))
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def hosts(full_disk: Path) -> Iterator[Hosts]:
    """The head, the host with the full disk, and the one that will be preempted."""
    cluster = Hosts(1)
    try:
        cluster.add(full_disk)
        cluster.add()
        yield cluster
    finally:
        cluster.stop()


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_a_full_disk_and_preemptions_cost_no_unit(hosts: Hosts, full_disk: Path, tmp_path: Path) -> None:
    (finished := tmp_path / "finished").mkdir()
    log = tmp_path / "log.txt"
    script = Path(__file__).with_name("driver.py")
    num_preemptions = 0
    with log.open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, script, "disk", finished],
            stdout=output,
            stderr=output,
            env={**environment(), "RAY_ADDRESS": hosts.address},
        )
        try:
            while not _ends_within(driver, PREEMPTION_SECONDS):
                hosts.kill(hosts.newest)
                hosts.add()
                num_preemptions += 1
        finally:
            driver.kill()
            driver.wait()
    text = log.read_text()
    assert driver.returncode == 0, text
    assert num_preemptions >= 2
    assert sorted(map(int, (path.name for path in finished.iterdir()))) == list(range(60))
    done = re.findall(r"^at work (\d+)$", text, re.MULTILINE)
    assert sorted(map(int, done)) == list(range(60))
    verdicts = re.findall(
        r"^node \S+ \((\w+)\) gets no more units: .*: OSError: .*No space left on device$", text, re.M
    )
    assert len(verdicts) == 1, text
    before, after = text.split("gets no more units")
    assert f"({verdicts[0]}), attempt" in before
    assert f"({verdicts[0]}), attempt" not in after
    assert [path.name for path in full_disk.iterdir()] == ["other-files"]
