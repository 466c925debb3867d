from __future__ import annotations

from clipmill.metrics import MetricsLog, read_metrics


def test_a_newer_attempt_replaces_what_it_did_again(tmp_path):
    first = MetricsLog(str(tmp_path), "000001-0000")
    for step in (10, 20, 30):
        first.write({"step": step, "split": "train", "loss": 1.0 * step})
    first.upload()
    first.close()
    second = MetricsLog(str(tmp_path), "000002-0000")
    for step in (20, 30, 40):
        second.write({"step": step, "split": "train", "loss": 2.0 * step})
    second.upload()
    second.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(str(tmp_path))] == [
        (10, 10.0),
        (20, 40.0),
        (30, 60.0),
        (40, 80.0),
    ]


def test_records_are_readable_before_the_run_has_ended(tmp_path):
    log = MetricsLog(str(tmp_path), "000001-0000")
    log.write({"step": 1, "split": "train", "loss": 1.0})
    log.upload()
    assert len(read_metrics(str(tmp_path))) == 1
    log.close()
    assert read_metrics(str(tmp_path / "absent")) == []
