"""A training whose folder is in a bucket: real ranks, killed while they upload through a slow line."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipmill import storage
from clipmill.training.checkpoint import newest
from tests.s3.proxy import Proxy
from tests.training.processes import kill_all, run, start, wait_for
from tests.training.toy import CHECKPOINT_EVERY, STEPS, read_losses, stage_command, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = ["prior.model.hidden_dim=48", "prior.model.num_layers=4"]
BYTES_PER_SECOND = 1_000_000
"""Of a connection: the checkpoint's largest file takes more than a second."""


def test_an_upload_cut_on_its_way_to_a_bucket_is_no_checkpoint(
    bucket_url: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, root, folder = tmp_path / "log.txt", f"{bucket_url}/run", f"{bucket_url}/run/prior"
    write_inputs(tmp_path)
    run(stage_command(tmp_path, tmp_path / "whole", "train-prior", 1, *MODEL), log, 2)
    undisturbed = read_losses(tmp_path / "whole" / "prior")
    for entry in storage.walk(str(tmp_path / "root" / "tokens")):
        storage.publish_file(tmp_path / "root" / "tokens" / entry.name, f"{root}/tokens/{entry.name}")
    command = [*stage_command(tmp_path, tmp_path / "ours", "train-prior", 1, *MODEL), f"root={root}"]
    second = f"{folder}/checkpoints/step-{2 * CHECKPOINT_EVERY:08d}/000001-0000"

    proxy.bytes_per_second = BYTES_PER_SECOND
    with monkeypatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        process = start(command, num_ranks=2, log=log)
    wait_for(lambda: any(entry.name.endswith(".pt") for entry in storage.walk(second)), process, log)
    kill_all(process)
    left = {entry.name for entry in storage.walk(second)}
    assert 0 < sum(name.endswith(".pt") for name in left) < 3, f"not in the middle of the upload: {left}"
    saved = newest(folder)
    assert saved is not None
    assert saved.step == CHECKPOINT_EVERY

    run(command, log, 2)
    saved = newest(folder)
    assert saved is not None
    assert saved.step == STEPS
    assert read_losses(folder) == undisturbed, "the curve has a hole or another loss"
