"""``--retry-quarantined`` never makes a data set worse."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.pipeline import shard
from clipmill.shards.manifest import Manifest
from clipmill.stages import run_stage
from tests.pipeline.corpus import run_config, write_corpus

NUM_BAD = 24
"""More than the first videos that may all fail, and more than the default budget."""


@pytest.fixture
def generous(embedded: None, tmp_path: Path) -> RunConfig:
    """A data set that was frozen with all of its bad videos in quarantine."""
    write_corpus(tmp_path / "source", 1, with_bad=False)
    for number in range(NUM_BAD):
        (tmp_path / "source" / f"bad{number:02d}.mp4").write_text(f"no video {number}")
    config = run_config(
        tmp_path / "run", tmp_path / "source", num_workers=2, unit_bytes=10**9, max_failed_videos=NUM_BAD
    )
    summary = run_stage("shard", config)
    assert summary is not None
    assert (summary["failed"], summary["videos"]) == (NUM_BAD, NUM_BAD + 4)
    return config


def fingerprints(config: RunConfig) -> list[str]:
    return [Manifest.load(config.folder("clips", split), "clips").fingerprint for split in ("train", "val")]


@pytest.mark.parametrize("max_failed_videos", [NUM_BAD, 0])
def test_a_retry_that_fails_again_leaves_the_data_set_as_it_was(generous: RunConfig, max_failed_videos: int) -> None:
    before = fingerprints(generous)
    data = generous.data.model_copy(update={"max_failed_videos": max_failed_videos, "max_failed_share": 0.0})
    config = generous.model_copy(update={"data": data})
    summary = run_stage("shard", config, "retried")
    assert summary is not None
    assert (summary["failed"], summary["videos"]) == (NUM_BAD, NUM_BAD + 4)
    assert fingerprints(config) == before
    assert storage.read_bytes(config.folder("clips", "quarantine.jsonl")).count(b"\n") == NUM_BAD
    assert shard.is_finished(config)
    assert run_stage("shard", config) is None
