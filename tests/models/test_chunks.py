"""Codes beyond a tokenizer's training decode in pieces, of which nothing shows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from clipmill.config import VQVAEModelConfig
from clipmill.models import chunks
from clipmill.models.chunks import Reach, decode_in_chunks, decode_to_pixels, reaches
from clipmill.models.vqvae import VQVAE, num_frames_of, to_input, to_pixels

CONVOLUTIONAL = {"axial_attention": False, "norm": "batch"}


def tiny(**changes: object) -> VQVAE:
    settings = {"hidden_dim": 8, "num_res_layers": 1, "embedding_dim": 4, "num_codes": 16, "downsample": (2, 2, 2)}
    torch.manual_seed(3)
    return VQVAE(VQVAEModelConfig.model_validate(settings | changes), pixel_variance=0.06).eval()


def chunked(model: VQVAE, codes: Tensor, trained: tuple[int, int, int]) -> Tensor:
    return torch.cat(list(decode_in_chunks(model, codes, trained)), 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("downsample", [(2, 2, 2), (4, 4, 2), (1, 4, 4)])
def test_the_reach_is_that_of_a_changed_latent(causal: bool, downsample: tuple[int, int, int]) -> None:
    """Against pixels that really change, in a model whose weights have no zeros to hide behind."""
    model = tiny(**CONVOLUTIONAL, causal=causal, downsample=downsample)
    codes = torch.zeros(1, 21, 21, 21, dtype=torch.int64)
    with torch.inference_mode():
        before = model.decode(codes)
        codes[:, 10, 10, 10] = 1
        changed = (model.decode(codes) - before).abs().amax((0, 1)).gt(0).nonzero()
    for axis, reach in enumerate(reaches(model)):
        assert reach is not None
        ends = torch.tensor([chunks._first_pixel(model, axis, latent + 1) for latent in range(21)])
        nearest, farthest = (
            int(torch.searchsorted(ends, place, right=True))
            for place in (changed[:, axis].min(), changed[:, axis].max())
        )
        assert reach == Reach(before=farthest - 10, after=10 - nearest)
        assert not (causal and axis == 0 and reach.after)


@pytest.mark.parametrize(
    ("changes", "bounded"),
    [
        ({"axial_attention": True}, (False, False, False)),
        ({"axial_attention": True, "causal": True}, (False, False, False)),
        ({**CONVOLUTIONAL, "norm": "group"}, (False, False, False)),
        ({**CONVOLUTIONAL, "norm": "group", "causal": True}, (True, False, False)),
    ],
)
def test_attention_and_statistics_have_no_bounded_reach(changes: dict[str, object], bounded: tuple[bool, ...]) -> None:
    assert tuple(reach is not None for reach in reaches(tiny(**changes))) == bounded


@pytest.mark.parametrize(
    ("causal", "shape"), [(True, (37, 4, 4)), (True, (30, 25, 9)), (True, (4, 9, 33)), (False, (4, 9, 33))]
)
def test_chunks_and_tiles_of_convolutions_are_the_whole(causal: bool, shape: tuple[int, int, int]) -> None:
    model = tiny(**CONVOLUTIONAL, causal=causal)
    codes = torch.randint(16, (2, *shape))
    with torch.inference_mode():
        whole = model.decode(codes)
    assert num_frames_of(model.config, shape[0]) == whole.shape[2]
    torch.testing.assert_close(chunked(model, codes, (4, 4, 4)), whole, atol=1e-4, rtol=0)


def test_chunks_of_a_causal_group_norm_are_the_whole() -> None:
    """Its statistics are of one frame: time is bounded, a frame is not."""
    model = tiny(axial_attention=False, norm="group", causal=True, num_codebooks=2)
    codes = torch.randint(16, (1, 40, 4, 4, 2))
    with torch.inference_mode():
        whole = model.decode(codes)
    pieces = list(decode_in_chunks(model, codes, (4, 4, 4)))
    assert len(pieces) > 2
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_codes_of_the_trained_size_decode_as_they_always_did(causal: bool) -> None:
    model = tiny(axial_attention=True, causal=causal)
    codes = torch.randint(16, (2, 4, 4, 6))
    with torch.inference_mode():
        whole = model.decode(codes)
    assert torch.equal(chunked(model, codes, (4, 4, 6)), whole)
    assert torch.equal(decode_to_pixels(model, codes, (4, 4, 6)), to_pixels(whole))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("trained", [2, 3, 4, 5])
def test_every_frame_of_faded_chunks_has_the_weight_of_one(causal: bool, trained: int) -> None:
    model = tiny(axial_attention=True, causal=causal, downsample=(4, 2, 2))
    for length in range(trained + 1, 4 * trained):
        pieces = chunks._faded(model, 0, length, trained)
        total = torch.zeros(num_frames_of(model.config, length))
        for piece in pieces:
            assert (piece.start >= 0, piece.stop <= length, piece.stop - piece.start) == (True, True, trained)
            decoded = torch.arange(num_frames_of(model.config, trained))[piece.skipped :][: len(piece.weights)]
            assert torch.equal(decoded + 4 * piece.start, torch.arange(piece.first, piece.last))
            total[piece.first : piece.last] += piece.weights
        torch.testing.assert_close(total, torch.ones_like(total))
        assert all(a.first < b.first and a.last < b.last for a, b in itertools.pairwise(pieces))


# --------------------------------------------------------------------------------------------------- seams


def moving_blobs(num_videos: int, num_frames: int) -> Tensor:
    """Videos uint8 [B, T, 16, 16, 3] of a soft blob that circles at a constant speed."""
    generator = torch.Generator().manual_seed(0)
    phase, radius, speed = torch.rand(3, num_videos, 1, generator=generator) * torch.tensor([[[6.28]], [[4]], [[0.2]]])
    angle = phase + (0.15 + speed) * torch.arange(num_frames)
    x, y = 7.5 + (2 + radius) * angle.cos(), 7.5 + (2 + radius) * angle.sin()
    grid = torch.arange(16)
    distance = (grid - x[..., None]).square()[..., None, :] + (grid - y[..., None]).square()[..., None]
    colours = torch.tensor([250.0, 160.0, 60.0])
    return (distance.div(-6).exp()[..., None] * colours).to(torch.uint8)


@pytest.fixture(scope="module")
def trained_with_attention() -> VQVAE:
    """Trained on 8 frames (4 latent frames) until it follows the blobs."""
    model = tiny(hidden_dim=16, num_codes=64, embedding_dim=16, axial_attention=True, num_heads=1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    videos = to_input(moving_blobs(64, 8))
    model.pixel_variance = float(videos.var())
    for step in range(200):
        output = model(videos[step % 16 :: 16])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["nmse"] < 0.3
    return model.eval()


def seam_ratio(video: Tensor, borders: range) -> float:
    """Mean absolute difference of frames b - 1 and b at the borders, over that elsewhere; video [B, 3, T, H, W]."""
    differences = video.diff(dim=2).abs().mean((0, 1, 3, 4))  # [T - 1]
    elsewhere = [place for place in range(len(differences)) if place + 1 not in borders]
    return float(differences[[border - 1 for border in borders]].mean() / differences[elsewhere].mean())


def test_no_seam_shows_between_faded_chunks(trained_with_attention: VQVAE) -> None:
    """Every latent frame comes from the same place of a window: no rhythm but that of the chunks."""
    model, video = trained_with_attention, to_input(moving_blobs(16, 72))
    with torch.inference_mode():
        codes = torch.cat([model.encode(video[:, :, start : start + 8])[:, 2:3] for start in range(0, 64, 2)], 1)
        cut = torch.cat([model.decode(part) for part in codes.split(4, 1)], 2)
    faded = chunked(model, codes, (4, 8, 8))
    assert [piece.first for piece in chunks._faded(model, 0, 32, 4)] == list(range(0, 60, 4))
    assert seam_ratio(faded, range(4, 64, 4)) <= 1.1
    assert seam_ratio(cut, range(8, 64, 8)) > 1.1  # so the measure sees a seam where there is one
    assert (faded - video[:, :, 4:68]).square().mean() < (cut - video[:, :, 4:68]).square().mean()
