from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import math
import sys
import types
from typing import Any

import numpy as np
import pytest

from clipmill.config import TrainingConfig
from clipmill.errors import UserError
from clipmill.metrics import read_metrics
from clipmill.training.telemetry import Telemetry, require_wandb, summarise
from clipmill.training.validation import film_strips

FACTS = {"clips_per_second": 8.0, "data_wait_share": 0.25, "memory_bytes": 2.0**30, "grad_norm": 1.5, "lr": 1e-3}


class Listener:
    stop_requested = False

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def update(self, facts: dict[str, Any]) -> None:
        self.heard.append(facts)


def test_numbers_that_are_not_finite_are_left_out_and_the_status_line_keeps_the_last_good_ones(tmp_path):
    listener = Listener()
    telemetry = Telemetry(str(tmp_path), "000001-0000", TrainingConfig(steps=30), listener)
    telemetry.log(10, "train", {**FACTS, "loss": 2.0, "skipped_steps": 0})
    telemetry.progress(11)
    telemetry.log(20, "train", {**FACTS, "loss": math.nan, "grad_norm": math.inf, "skipped_steps": 1})
    telemetry.close()
    assert listener.heard[1] == {**listener.heard[0], "step": 11}
    shown = {"step": 20, "total": 30, "loss": 2.0, "grad_norm": 1.5, "memory": "1.0 GiB", "skipped_steps": 1}
    assert shown.items() <= listener.heard[2].items()
    first, second = read_metrics(str(tmp_path))
    assert (first["loss"], second.get("loss"), second.get("grad_norm")) == (2.0, None, None)
    expected = {"steps": 20, "loss": 2.0, "clips_per_second": 8.0, "data_wait_share": 0.25, "skipped_steps": 1}
    assert summarise(str(tmp_path)) == expected


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_weights_and_biases_is_asked_for_and_not_there():
    require_wandb(None)
    with pytest.raises(UserError, match="wandb_project=mill needs the package wandb; `pip install wandb`"):
        require_wandb("mill")


def test_film_strips_show_first_and_last_frame_above_their_reconstructions():
    clips = np.arange(2 * 20, dtype=np.uint8).reshape(2, 20, 1, 1, 1).repeat(4, 2).repeat(4, 3).repeat(3, 4)
    picture = film_strips(clips, clips + 100)
    assert picture.shape == (2 * 2 * 4 + 2, 8 * 4, 3)
    corners = [picture[row, column, 0] for row in (0, 4, 10, 14) for column in (0, -1)]
    assert corners == [0, 19, 100, 119, 20, 39, 120, 139]
    assert (picture[8:10] == 255).all()


@pytest.mark.parametrize(
    ("mode", "logged_in", "refused"), [("online", False, True), ("online", True, False), ("offline", False, False)]
)
def test_weights_and_biases_without_a_login_is_refused_before_the_training(
    monkeypatch: pytest.MonkeyPatch, mode: str, logged_in: bool, refused: bool
) -> None:
    wandb: Any = types.ModuleType("wandb")  # the package is no dependency; it was tried by hand
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    wandb.login = lambda *, prompt, verify: logged_in
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    expected = pytest.raises(UserError, match="wandb_project=mill: nobody has logged in on this machine; run `wandb")
    with expected if refused else contextlib.nullcontext():
        require_wandb("mill")
