"""What Prometheus reads from a node of a real cluster while a stage runs there, and what the board counts for it."""

from __future__ import annotations

import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from clipmill.board import MAX_LABELS, OTHER_CAUSES, Board, kind_of_cause
from clipmill.cluster.metrics import COUNTERS, GAUGES, PREFIX
from clipmill.cluster.server import Server
from tests.cluster.head import Head, started_head

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """\
import sys, time
from pathlib import Path
from clipmill.board import BOARD
from clipmill.cluster import fan_out
from clipmill.config import ClusterConfig

def make_worker(mark):
    def work(unit):
        if unit == 3 and not mark.exists():
            mark.touch()
            raise OSError("No space left on device: '/scratch/7'")
        return {"work": {"clips": 2, "bytes": 100, "frames": 32, "gpu_wait_seconds": 0.5}}
    return work

def take(unit, result):
    assert "work" not in result
    done.append(unit)
    facts = {"loss": 1.5, "clips_per_second": 3.0, "tokens_per_second": 4.0, "data_wait_share": 0.1, "mfu": 0.2}
    BOARD.advance(len(done), 10, "videos", facts)
    BOARD.count("quarantine", "moov atom not found")
    if len(done) == 10:
        time.sleep(float(sys.argv[2]))  # so that the metrics are read while the stage runs

done = []
BOARD.begin("shard", 1, "s3://user:MARKER@bucket/run")
fan_out(make_worker, (Path(sys.argv[1]),), list(range(10)), config=ClusterConfig(), on_result=take)
"""


@pytest.fixture
def head() -> object:
    with started_head(RAY_metrics_report_interval_ms="1000") as started:
        yield started


def read(head: Head) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and values of clipmill's samples by name."""
    with urllib.request.urlopen(head.metrics, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if PREFIX in sample.name:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prometheus_reads_every_metric_of_a_stage(head: Head, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    (script := tmp_path / "stage.py").write_text(SCRIPT)
    client = JobSubmissionClient(head.jobs)
    job = Server(client).ask(  # whose agent may not be there yet
        lambda: client.submit_job(
            entrypoint=f"{sys.executable} {script} {tmp_path / 'mark'} 120",
            runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
        )
    )
    wanted = {f"ray_{PREFIX}{name}_total" for name in COUNTERS} | {f"ray_{PREFIX}{name}" for name in GAUGES}
    deadline = time.monotonic() + 120
    # The time left is known only where something is left.
    while missing := wanted - {f"ray_{PREFIX}eta_seconds"} - (found := read(head)).keys():
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    labels = [labels for samples in found.values() for labels, _ in samples]
    assert {(one["stage"], one["run"]) for one in labels} == {("shard", "s3://bucket/run")}
    time.sleep(4)  # the last units are exported within 2 s and collected within 1 s
    values = {name.removeprefix(f"ray_{PREFIX}"): samples[0] for name, samples in read(head).items()}
    numbers = {name: value for name, (_, value) in values.items()}
    assert numbers | {"loss": 1.5, "clips_total": 20, "frames_total": 320, "gpu_wait_seconds_total": 5} == numbers
    assert numbers | {"units_total": 10, "retries_total": 1, "failures_total": 1, "quarantine_total": 10} == numbers
    assert values["failures_total"][0]["cause"].startswith("OSError: No space left on device")
    assert values["units_total"][0]["node"]
    client.stop_job(job)


def test_causes_of_one_kind_are_one_label() -> None:
    board = Board()
    for number in range(100):
        board.count("failures", f"OSError: cannot read s3://bucket/{number}.mp4 (12{number} bytes)")
        board.count("quarantine", f"{'abcdefghij'[number % 10] * (number + 1)} is broken")
    totals = board.totals()
    assert totals["failures", "OSError: cannot read ... bytes)"] == 100
    assert len([label for kind, label in totals if kind == "quarantine"]) == MAX_LABELS + 1
    assert totals["quarantine", OTHER_CAUSES] == 100 - MAX_LABELS
    assert kind_of_cause("") == "unknown"
    assert len(kind_of_cause("word " * 100)) <= 80


def test_totals_go_on_over_stages() -> None:
    board = Board()
    board.begin("shard", 1, "root")
    board.add("clips", 2, "host-a")
    board.begin("tokenize", 1, "root")
    board.add("clips", 3, "host-a")
    board.add("clips", 1, "host-b")
    assert board.totals() == {("clips", "host-a"): 5, ("clips", "host-b"): 1}
