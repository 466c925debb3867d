from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.errors import UserError
from clipmill.evaluation.networks import Network
from clipmill.models.torchscript import weights_sha256
from tests.evaluation.networks import TinyC3D, TinyI3D, TinyLPIPS, save

CPU = torch.device("cpu")


def clips(seed: int, num_frames: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, num_frames, 8, 8, 3), dtype=np.uint8)


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full([x.shape[0], 101], float("nan"))


def test_features_are_those_of_the_module_in_the_file(tmp_path: Path):
    network, video = Network("fvd_weights", save(TinyI3D(), tmp_path / "i3d.pt"), CPU), clips(0)
    found = network.features(video)
    assert (found.shape, found.dtype) == ((3, 400), np.float32)
    with torch.inference_mode():
        channels_first = torch.from_numpy(video).permute(0, 4, 1, 2, 3)
        expected = TinyI3D()(channels_first, rescale=True, resize=True, return_features=True)
    assert found == pytest.approx(expected.double().numpy(), abs=1e-6)


def test_probabilities_are_one_row_a_clip(tmp_path: Path):
    found = Network("is_weights", save(TinyC3D(), tmp_path / "c3d.pt"), CPU).probabilities(clips(1))
    assert found.shape == (3, 101)
    assert found.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-6)


def test_lpips_gets_frames_between_minus_one_and_one(tmp_path: Path):
    network = Network("lpips_weights", save(TinyLPIPS(), tmp_path / "lpips.pt"), CPU)
    black, white = np.zeros((2, 5, 8, 8, 3), np.uint8), np.full((2, 5, 8, 8, 3), 255, np.uint8)
    assert network.distances(black, white).tolist() == [4.0, 4.0]
    half = np.concatenate([black[:, :2], white[:, 2:]], axis=1)
    assert network.distances(half, white) == pytest.approx([8 / 5, 8 / 5])  # the mean over five frames
    assert network.distances(half[:1], half[:1]).tolist() == [0.0]


def test_a_file_that_is_missing_or_no_torchscript_is_named(tmp_path: Path):
    absent = str(tmp_path / "absent.pt")
    for ask in (
        lambda: Network("evaluate.fvd_weights", absent, CPU),
        lambda: weights_sha256("evaluate.fvd_weights", absent),
    ):
        with pytest.raises(UserError, match=r"evaluate\.fvd_weights .*absent\.pt does not exist"):
            ask()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"is not a TorchScript file"):
        Network("is_weights", str(tmp_path / "state.pt"), CPU)


def test_a_module_of_another_kind_is_refused_with_what_it_said(tmp_path: Path):
    c3d = Network("fvd_weights", save(TinyC3D(), tmp_path / "c3d.pt"), CPU)
    with pytest.raises(UserError, match=r"docs/evaluation\.md says: forward"):
        c3d.features(clips(2))
    i3d = Network("is_weights", save(TinyI3D(), tmp_path / "i3d.pt"), CPU)
    with pytest.raises(UserError, match="called otherwise than FVD is"):
        i3d.probabilities(clips(2))
    with pytest.raises(UserError, match="not B 3 16 H W"):
        Network("is_weights", str(tmp_path / "c3d.pt"), CPU).probabilities(clips(2, num_frames=12))
    flatten = Network("is_weights", save(nn.Flatten(), tmp_path / "flatten.pt"), CPU)
    with pytest.raises(UserError, match=r"returned \[3, 3072\], not \[3, 101\]"):
        flatten.probabilities(clips(2))
    with pytest.raises(UserError, match="returned NaN"):
        Network("is_weights", save(NotANumber(), tmp_path / "nan.pt"), CPU).probabilities(clips(2))


def test_the_hash_is_of_the_content(tmp_path: Path):
    path = save(TinyLPIPS(), tmp_path / "lpips.pt")
    assert weights_sha256("lpips_weights", path) == hashlib.sha256(Path(path).read_bytes()).hexdigest()
