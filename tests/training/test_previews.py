"""What a training shows while it runs: the same samples of every class, and clips of every class reconstructed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipmill import storage
from clipmill.config import RunConfig, TrainingConfig
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.studio import studio_of
from clipmill.training.previews import MOST_SAMPLES, Preview, Samples, Stopped
from clipmill.training.telemetry import Telemetry
from clipmill.training.validation import PICTURED_CLIPS, _Pictured
from clipmill.video import decode_mp4
from tests.training.processes import run
from tests.training.toy import read_losses, stage_command

MODELS = {
    "vqvae": {"model": {"hidden_dim": 8, "num_res_layers": 1, "embedding_dim": 4, "num_codes": 16}},
    "prior": {"model": {"hidden_dim": 12, "num_heads": 2, "num_layers": 1}},
}


def parts(num_classes: int, clips: Any = None, prepare: Any = None, **keys: Any) -> tuple[Prior, Samples]:
    config = RunConfig.model_validate({"root": "x", **MODELS})
    torch.manual_seed(0)
    model = config.prior.model.model_copy(update={"class_conditional": num_classes > 0, **keys})
    tokenizer = VQVAE(config.vqvae.model, 0.08)
    shape = (1, 4) if keys else None
    prior = Prior(model, (1, 4, 4), 16, tokenizer.quantizer.codebook, num_classes, shape)
    return prior, Samples(1, studio_of(config), tokenizer, num_classes, clips, prepare, 8.0)


@pytest.mark.parametrize(
    ("num_classes", "labels"),
    [(0, None), (3, [0, 0, 1, 1, 2, 2]), (12, list(range(12))), (99, list(range(MOST_SAMPLES)))],
)
def test_every_class_is_shown_as_far_as_there_is_room(num_classes: int, labels: list[int] | None) -> None:
    num_samples, chosen, condition = parts(num_classes)[1]._given
    assert condition is None
    assert labels == (None if chosen is None else chosen.tolist())
    assert num_samples == (4 if labels is None else len(labels))


def test_a_prior_with_a_condition_is_shown_what_validation_clips_give(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "weight": torch.tensor([1.0, 1, 1, 1, 0]),
        "label": torch.tensor([1, 1, 1, 0, 0]),
        "condition": torch.arange(20.0).view(5, 1, 4),
    }
    monkeypatch.setattr("clipmill.training.previews.eval_batches", lambda *_, **__: iter([{}]))
    _, samples = parts(2, clips=object(), prepare=lambda _: given, condition="text")
    num_samples, labels, condition = samples._given
    assert (num_samples, labels.tolist()) == (3, [0, 1, 1])
    assert condition.tolist() == given["condition"][[3, 0, 1]].tolist()


def clips_of(prior: Prior, samples: Samples) -> np.ndarray:
    preview = samples.make(prior, lambda _: None)
    assert preview is not None
    assert preview.clips is not None
    return preview.clips


def test_the_same_weights_make_the_same_samples_and_others_make_others() -> None:
    prior, samples = parts(2)
    first = clips_of(prior, samples)
    assert first.shape == (4, 4, 16, 16, 3)
    assert np.array_equal(first, clips_of(prior, samples))
    with torch.no_grad():
        prior.head.weight.normal_()
    assert not np.array_equal(first, clips_of(prior, samples))


def test_a_stop_ends_the_drawing() -> None:
    def stop(_: int) -> None:
        raise Stopped

    prior, samples = parts(2)
    assert samples.make(prior, stop) is None


def test_logits_that_are_not_finite_cost_the_samples_and_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    prior, samples = parts(0)
    with torch.no_grad():
        prior.head.weight.fill_(torch.nan)
    assert samples.make(prior, lambda _: None) is None
    assert "no samples at this step: sample 0: the logits of the prior are not finite" in caplog.text


def test_a_preview_is_in_the_folder_and_in_tensorboard_beside_the_config(tmp_path: Path) -> None:
    storage.publish_bytes(str(tmp_path / "config.yaml"), b"root: here\n")
    report: Any = SimpleNamespace(update=lambda facts: None)
    studio = studio_of(RunConfig(root="x"))
    telemetry = Telemetry(str(tmp_path), "000001-0000", TrainingConfig(lr=0.125), report, studio)
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8)
    telemetry.log_preview(20, "samples", Preview(clips[0, 0], clips, 8.0))
    telemetry.close()
    assert (tmp_path / "previews" / "step-00000020.png").read_bytes()[:4] == b"\x89PNG"
    assert len(decode_mp4((tmp_path / "previews" / "step-00000020.mp4").read_bytes())) == 4
    events = EventAccumulator(str(tmp_path / "tensorboard" / "000001-0000")).Reload()
    texts = [events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("hparams", "config")]
    assert b"| lr | 0.125 |" in texts[0]
    assert b"    root: here" in texts[1]
    pictures = EventAccumulator(str(tmp_path / "tensorboard" / "000001-0000" / "samples")).Reload()
    assert pictures.Images("samples_playing")[0].encoded_image_string[:4] == b"GIF8"
    assert pictures.Images("samples")[0].step == 20


def test_reconstructions_are_of_different_classes() -> None:
    clips = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1, 1).expand(8, 2, 4, 4, 3)
    pictured = _Pictured()
    for first in (0, 4):
        labels = ["a", "a", "b", "a"] if first == 0 else ["a", "c", "b", "d"]
        weight = torch.tensor([1.0, 1, 1, 1] if first == 0 else [1.0, 1, 1, 0])
        pictured.add({"label": labels, "weight": weight, "video": clips[first : first + 4]}, clips[first : first + 4])
    picture = pictured.picture()
    assert picture is not None
    assert [int(picture[row * 10, 0, 0]) for row in range(PICTURED_CLIPS)] == [0, 2, 5, 1]


@pytest.mark.slow
@pytest.mark.ci
def test_samples_change_nothing_in_the_training(workspace: Path, tmp_path: Path) -> None:
    log, results = tmp_path / "log.txt", []
    for name, every in (("with", "5"), ("without", "null")):
        settings = ["prior.training.steps=12", f"prior.training.sample_every={every}", "prior.training.weights_ema=0.9"]
        run(stage_command(workspace, tmp_path / name, "train-prior", 1, *settings), log, 1)
        folder = tmp_path / name / "prior"
        results.append((read_losses(folder), sorted(path.name for path in (folder / "exports").iterdir())))
    assert results[0] == results[1]
    made = sorted(path.name for path in (tmp_path / "with" / "prior" / "previews").iterdir())
    assert made == [f"step-{step:08d}.{kind}" for step in (5, 10, 12) for kind in ("mp4", "png")]
    assert not (tmp_path / "without" / "prior" / "previews").exists()
