"""A killed training goes on as if nothing had happened: two gloo ranks, real processes, SIGKILL."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipmill.config import load_config
from clipmill.errors import UserError
from clipmill.metrics import read_metrics
from clipmill.models.export import load_prior
from clipmill.training import prior
from clipmill.training.checkpoint import newest
from tests.training.networks import RandomDistance, save
from tests.training.processes import kill_all, run, start, wait_for
from tests.training.toy import CHECKPOINT_EVERY, CLASSES, EXACT, STEPS, read_losses, stage_command


def _run_killed(command: list[str], log: Path, folder: Path, num_ranks: int) -> None:
    """Lets the run commit its first checkpoint, then takes its power."""
    process = start(command, num_ranks=num_ranks, log=log)
    wait_for(lambda: list(folder.glob("checkpoints/*/*/COMMITTED")), process, log)
    kill_all(process)
    assert process.returncode == -9, "it had ended before it could be killed"
    assert not (folder / "exports").exists()


def _check_exact_resume(
    workspace: Path, tmp_path: Path, stage: str, zero_stage: int, num_ranks: int, *assignments: str
) -> None:
    folder = {"train-vqvae": "vqvae", "train-prior": "prior"}[stage]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    log = tmp_path / "log.txt"
    run(stage_command(workspace, whole, stage, zero_stage, *assignments), log, num_ranks)
    command = stage_command(workspace, killed, stage, zero_stage, *assignments)
    _run_killed(command, log, killed / folder, num_ranks)
    run(command, log, num_ranks)

    undisturbed, resumed = read_losses(whole / folder), read_losses(killed / folder)
    assert list(undisturbed) == list(range(1, STEPS + 1))
    attempts = sorted(path.name for path in (killed / folder / "metrics").iterdir())
    first_step = json.loads((killed / folder / "metrics" / attempts[-1]).read_text().splitlines()[0])["step"]
    assert first_step > CHECKPOINT_EVERY, "it did not resume from a checkpoint"
    assert len(set(undisturbed.values())) > STEPS // 2, "a loss that does not move proves nothing"
    assert resumed == undisturbed, "the curve of the resumed run has a hole or another loss"
    exports = [sorted(path.name for path in (root / folder / "exports").iterdir()) for root in (whole, killed)]
    assert exports[0] == exports[1], "the exported weights differ"


@pytest.mark.timeout(600)
def test_the_prior_resumes_exactly_on_two_ranks(workspace, tmp_path):
    spikes = [
        f"prior.training.{setting}" for setting in ("bad_steps=skip", "spike_factor=1.15")
    ]  # what is usual is state
    _check_exact_resume(workspace, tmp_path, "train-prior", 1, 2, *spikes)
    last = [record for record in read_metrics(str(tmp_path / "whole" / "prior")) if record["split"] == "train"][-1]
    assert 3 < last["skipped_steps"] < STEPS // 2
    model, tokenizer, body, _ = load_prior(str(tmp_path / "killed" / "prior"))
    assert (body["step"], body["classes"]) == (STEPS, CLASSES)
    assert torch.equal(model.input.codebook, tokenizer.quantizer.codebook)


@pytest.mark.timeout(600)
def test_averaged_weights_resume_exactly_at_zero_stage_3_and_are_exported(workspace, tmp_path):
    average = "prior.training.weights_ema=0.9"
    _check_exact_resume(workspace, tmp_path, "train-prior", 3, 2, average)
    root = tmp_path / "killed"
    config = load_config([root / "run.yaml"], [average])
    weights, *_ = load_prior(str(root / "prior"))
    earlier = prior.export(config, STEPS - CHECKPOINT_EVERY, "float32")
    older, _, body, sha8 = load_prior(str(root / "prior"))
    assert (sha8, body["step"]) == (earlier, STEPS - CHECKPOINT_EVERY)
    assert prior.is_finished(config)  # to run it again does not undo that choice
    assert not torch.equal(older.head.weight, weights.head.weight)
    run([*stage_command(workspace, root, "export", 3, average), "--dtype", "bfloat16"], tmp_path / "log.txt", 1)
    narrow, _, body, _ = load_prior(str(root / "prior"))
    assert (body["step"], body["dtype"]) == (STEPS, "bfloat16")
    assert torch.equal(narrow.head.weight, weights.head.weight.bfloat16().float())
    with pytest.raises(
        UserError, match=f"no checkpoint of step 3 in .*; there are: {STEPS - CHECKPOINT_EVERY}, {STEPS}"
    ):
        prior.export(config, 3, "float32")
    with pytest.raises(UserError, match=r"has other settings: prior.training.weights_ema \(0.9 -> None\)"):
        prior.export(load_config([root / "run.yaml"]), None, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [3, 2], ids=["once", "accumulated"])
@pytest.mark.parametrize(("zero_stage", "num_ranks"), [(0, 2), (1, 4), (2, 2), (2, 4), (3, 4)])
def test_the_prior_resumes_exactly_at_every_zero_stage(workspace, tmp_path, zero_stage, num_ranks, micro_batch):
    if num_ranks == 4:
        micro_batch -= 1  # of two clips a rank
    settings = (f"prior.training.micro_batch={micro_batch}", "prior.training.weights_ema=0.9")
    _check_exact_resume(workspace, tmp_path, "train-prior", zero_stage, num_ranks, *settings)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "num_ranks"), [(1, 2), (0, 1)])
def test_the_tokenizer_resumes_exactly_with_its_codebook(workspace, tmp_path, zero_stage, num_ranks):
    average = "vqvae.training.weights_ema=0.9"
    _check_exact_resume(workspace, tmp_path, "train-vqvae", zero_stage, num_ranks, average)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_the_tokenizer_resumes_exactly_with_its_discriminator(workspace, tmp_path, zero_stage):
    """The first checkpoint, of step 8, comes before the tokenizer feels the discriminator and after it was trained."""
    network = save(RandomDistance(), tmp_path / "perceptual.pt")
    settings = {"adversarial_cost": 0.5, "adversarial_start": 10, "discriminator_dim": 8, "frames": 2}
    settings["perceptual_weights"] = network
    assignments = [f"vqvae.sharpness.{name}={value}" for name, value in settings.items()]
    _check_exact_resume(workspace, tmp_path, "train-vqvae", zero_stage, 2, *assignments)
    records = [each for each in read_metrics(str(tmp_path / "killed" / "vqvae")) if each["split"] == "train"]
    assert all(record["perceptual"] > 0 for record in records)
    trained = {record["step"] for record in records if record["discriminator"]}
    assert trained == set(range(6, STEPS + 1))  # from half of adversarial_start steps on


@pytest.mark.slow
def test_the_tokenizer_trains_alike_on_two_and_on_four_ranks(workspace, tmp_path):
    log, losses = tmp_path / "log.txt", []
    for num_ranks, zero_stage in ((2, 3), (4, 1)):
        root = tmp_path / str(num_ranks)
        settings = ["vqvae.training.global_batch=16", "vqvae.training.steps=16"]
        run(stage_command(workspace, root, "train-vqvae", zero_stage, *settings), log, num_ranks)
        losses.append(read_losses(root / "vqvae"))
    assert list(losses[0]) == list(range(1, 17))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    saved = newest(str(tmp_path / "2" / "vqvae"))  # at stage 3 every rank writes its buffers
    assert saved is not None
    names = [file["name"] for file in saved.files if "model_states" in file["name"]]
    states = [torch.load(Path(saved.url, name), weights_only=False)["module"] for name in names]
    assert len(states) == 2
    for name in ("codebook", "counts", "sums"):
        assert torch.equal(*(state[f"model.quantizer.{name}"] for state in states))


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(workspace, tmp_path):
    log, root = tmp_path / "log.txt", tmp_path / "root"
    run(stage_command(workspace, root, "train-prior", 1, "prior.training.steps=2"), log, 1)
    before = sorted((root / "prior").glob("checkpoints/*/*"))
    far = ["prior.training.steps=24", "prior.training.log_every=4", "prior.training.lr=1e30"]
    command = stage_command(workspace, root, "train-prior", 1, *far)
    assert start(command, num_ranks=1, log=log).wait(timeout=240) == 1
    line = log.read_text().splitlines()[-1]  # step 3 takes the weights away, step 4 finds out
    found = re.search(
        r"step 4 gave loss nan on rank 0 \(clips (\w+(, \w+){5})\); the last good checkpoint is (\S+);", line
    )
    assert found, line
    assert found[3] == str(before[-1])
    assert sorted((root / "prior").glob("checkpoints/*/*")) == before
    assert start([*command, "prior.training.bad_steps=skip"], num_ranks=1, log=log).wait(timeout=240) == 1
    last = log.read_text().splitlines()[-1]
    assert "10 steps in a row up to step 13 were skipped, the last for grad_norm nan" in last
    records = [record for record in read_metrics(str(root / "prior")) if record["split"] == "train"]
    assert [(record["step"], record.get("skipped_steps")) for record in records[-2:]] == [(8, 5), (12, 9)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stops_is_named_and_the_training_ends(workspace, tmp_path, rank):
    log = tmp_path / "log.txt"
    endless = ["prior.training.steps=100000", "prior.training.hang_seconds=3"]
    process = start(stage_command(workspace, tmp_path / "root", "train-prior", 1, *endless), num_ranks=2, log=log)
    try:
        wait_for(lambda: list((tmp_path / "root" / "prior").glob("checkpoints/*/*/COMMITTED")), process, log)
        ranks = {member.environ()["RANK"]: member for member in psutil.Process(process.pid).children()}
        ranks[str(rank)].suspend()
        wait_for(lambda: f"rank {rank} does not answer" in log.read_text(), process, log)
    finally:
        kill_all(process)


def test_a_rank_that_stops_within_a_save_is_named_and_the_training_ends(workspace, tmp_path):
    log = tmp_path / "log.txt"
    command = stage_command(workspace, tmp_path / "root", "train-prior", 1, "prior.training.hang_seconds=3")
    process = start(command, num_ranks=2, log=log, module="tests.training.stops_in_save")
    try:
        wait_for(lambda: "rank 1 does not answer" in log.read_text(), process, log)
    finally:
        kill_all(process)


UNEVEN = "prior.training.global_batch=7"  # no world size but one divides it, so rows fill up
STEPS_EACH = 10


def _check_conversions(workspace: Path, tmp_path: Path, first: tuple[int, int], *others: tuple[int, int]) -> None:
    """Trains some steps at each (ranks, ZeRO stage) in turn, in one root, and all of them at the first in another."""
    log = tmp_path / "log.txt"
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    steps = STEPS_EACH * (1 + len(others))
    settings = [*EXACT, UNEVEN]
    run(stage_command(workspace, whole, "train-prior", first[1], *settings, _steps(steps)), log, first[0])
    for number, (num_ranks, zero_stage) in enumerate([first, *others], start=1):
        command = stage_command(workspace, changed, "train-prior", zero_stage, *settings, _steps(STEPS_EACH * number))
        run(command, log, num_ranks)
        padding = -7 % num_ranks
        assert not padding or f"on {num_ranks} ranks: {padding} of {7 + padding} rows" in log.read_text()
    undisturbed, converted = read_losses(whole / "prior"), read_losses(changed / "prior")
    assert list(converted) == list(range(1, steps + 1))
    assert len(set(undisturbed.values())) > steps // 2, "a loss that does not move proves nothing"
    assert converted == pytest.approx(undisturbed, rel=1e-5)  # clips of random codes: others would have other losses
    assert f"converted from {first[0]} ranks at ZeRO stage {first[1]}" in log.read_text()


def _steps(number: int) -> str:
    return f"prior.training.steps={number}"


@pytest.mark.timeout(600)
def test_the_prior_goes_on_at_another_world_size_and_zero_stage(workspace, tmp_path):
    _check_conversions(workspace, tmp_path, (2, 1), (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs", [[(4, 1), (2, 3), (3, 1)], [(2, 3), (3, 2), (1, 0)], [(2, 0), (4, 1), (2, 0)]], ids=str
)
def test_the_prior_goes_on_through_any_changes(workspace, tmp_path, runs):
    _check_conversions(workspace, tmp_path, *runs)


def test_what_cannot_be_resumed_is_refused_in_one_line(workspace, tmp_path):
    log, root = tmp_path / "log.txt", tmp_path / "root"
    steps = "prior.training.steps=2"
    nothing = f"prior.training.resume={tmp_path / 'nothing'}"
    run(stage_command(workspace, root, "train-prior", 1, steps), log, 1)
    refusals = {
        "prior.training.resume=never": "holds a checkpoint of step 2",
        nothing: None,  # its own checkpoint comes first
    }
    for assignment, line in refusals.items():
        command = stage_command(workspace, root, "train-prior", 1, "prior.training.steps=4", assignment)
        command.append("prior.training.offload=true")
        assert start(command, num_ranks=1, log=log).wait(timeout=240) == (2 if line else 0)
        assert (line or "converted from 1 ranks at ZeRO stage 1") in log.read_text()
    fresh = stage_command(workspace, tmp_path / "fresh", "train-prior", 1, nothing)
    assert start(fresh, num_ranks=1, log=log).wait(timeout=240) == 2
    assert "holds no committed checkpoint" in log.read_text().splitlines()[-1]
    assert not (tmp_path / "fresh" / "prior" / "checkpoints").exists()
    other = [f"prior.training.resume={root / 'prior'}", "prior.training.steps=6"]
    started = stage_command(workspace, tmp_path / "started", "train-prior", 1, *other)
    assert start(started, num_ranks=1, log=log).wait(timeout=240) == 0
    assert min(read_losses(tmp_path / "started" / "prior")) == 5


def test_another_data_set_is_refused_unless_it_is_accepted_knowingly(workspace, tmp_path):
    log, root = tmp_path / "log.txt", tmp_path / "root"
    run(stage_command(workspace, root, "train-prior", 1, "prior.training.steps=2"), log, 1)
    (root / "tokens").unlink()
    (root / "tokens").mkdir()
    for split in ("train", "val"):  # five clips for twenty-one
        (root / "tokens" / split).symlink_to(workspace / "root" / "tokens" / "val")
    command = stage_command(workspace, root, "train-prior", 1, "prior.training.steps=5")
    assert start(command, num_ranks=1, log=log).wait(timeout=240) == 2
    assert "--accept-new-dataset" in log.read_text().splitlines()[-1]
    run([*command, "--accept-new-dataset"], log, 1)
    assert list(read_losses(root / "prior")) == [1, 2, 3, 4, 5]
    saved = newest(str(root / "prior"))
    assert saved is not None
    assert (saved.step, saved.state["dataset_since"]) == (5, 2)
    further = stage_command(workspace, root, "train-prior", 1, "prior.training.steps=6")
    run(further, log, 1)  # the checkpoint is of this data set now
    (root / "tokens" / "train").unlink()
    shutil.copytree(workspace / "root" / "tokens" / "train", root / "tokens" / "train")
    manifest = root / "tokens" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"right"', '"up", "right"'))
    assert start([*further, "--accept-new-dataset"], num_ranks=1, log=log).wait(timeout=240) == 2
    line = log.read_text().splitlines()[-1]
    assert re.search(r"prior has other settings: classes \('2, \w{8}' -> '3, \w{8}'\); restore them", line), line
    saved = newest(str(root / "prior"))
    assert saved is not None
    assert (saved.step, saved.state["dataset_since"]) == (6, 2)


@pytest.mark.parametrize(("micro_batch", "goes_on"), [(None, True), (2, False)])
def test_the_tokenizer_wants_the_clips_of_a_micro_step_unchanged(workspace, tmp_path, micro_batch, goes_on):
    """Four clips a step: one micro-step of one rank or two; but two micro-steps of one rank are one of two."""
    log, root = tmp_path / "log.txt", tmp_path / "root"
    settings = [f"vqvae.training.micro_batch={json.dumps(micro_batch)}"]
    run(stage_command(workspace, root, "train-vqvae", 1, *settings, "vqvae.training.steps=2"), log, 1)
    command = stage_command(workspace, root, "train-vqvae", 1, *settings, "vqvae.training.steps=4")
    status = start(command, num_ranks=2, log=log).wait(timeout=240)
    if goes_on:
        assert (status, list(read_losses(root / "vqvae"))) == (0, [1, 2, 3, 4])
        (attempt, *_) = sorted((root / "vqvae" / "tensorboard").iterdir())
        pictures = EventAccumulator(str(attempt / "reconstructions")).Reload().Images("reconstructions")
        (picture,) = pictures
        assert (picture.step, picture.width, picture.height) == (2, 4 * 16, 4 * 2 * 16 + 3 * 2)  # frames; pairs, gaps
        assert "converted from 1 ranks at ZeRO stage 1" in log.read_text()
    else:
        assert status != 0
        assert "normalised over 2 clips at a time (micro-batch x workers), this run would over 4" in log.read_text()
        run([*command, "vqvae.training.micro_batch=1"], log, 2)
        assert list(read_losses(root / "vqvae")) == [1, 2, 3, 4]
