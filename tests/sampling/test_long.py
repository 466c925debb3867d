"""Videos beyond a prior's window: the window slides, and what conditions it slides along."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clipmill.config import PriorModelConfig, VQVAEModelConfig, identity
from clipmill.errors import UserError
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, to_pixels
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.long import Batch, VideoLength, Videos, nearest_num_frames, sample_videos, video_length

SHAPE = (4, 2, 2)
INDICES = [0, 5]


def make_models(
    causal: bool = False, condition_shape: tuple[int, ...] | None = None, **keys: Any
) -> tuple[Prior, VQVAE, dict[str, Any]]:
    """A prior of 4 latent frames (16 frames; 13 if causal), its tokenizer, and the body of its export."""
    torch.manual_seed(2)
    settings = {"hidden_dim": 8, "num_res_layers": 1, "embedding_dim": 4, "num_codes": 16, "downsample": (4, 4, 4)}
    tokenizer = VQVAE(VQVAEModelConfig.model_validate(settings | {"causal": causal}), 0.06).eval()
    config = PriorModelConfig(hidden_dim=24, num_heads=2, num_layers=1, dropout=0, attention_dropout=0, **keys)
    prior = Prior(config, SHAPE, 16, torch.randn(16, 4), condition_shape=condition_shape).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    body = {
        "kind": "prior",
        "sha8": "0" * 8,
        "model": identity(config),
        "latent_shape": list(SHAPE),
        "condition_shape": condition_shape,
        "tokenizer": {"kind": "vqvae", "sha8": "0" * 8, "model": identity(tokenizer.config)},
    }
    return prior, tokenizer, body


def drawing(prior: Prior) -> Any:
    return partial(generate, prior, seed=7, indices=INDICES, filters=Filters())


def sampled(draw: Any, tokenizer: VQVAE, length: VideoLength, **given: Tensor) -> Videos:
    """One batch."""
    (videos,) = sample_videos([Batch(draw, **given)], tokenizer, length, lambda _, videos: videos)
    return videos


@pytest.mark.parametrize("causal", [False, True])
def test_a_video_of_the_window_is_what_generate_makes(causal: bool) -> None:
    prior, tokenizer, body = make_models(causal)
    videos = sampled(drawing(prior), tokenizer, video_length(body, None))
    codes = generate(prior, seed=7, indices=INDICES)
    assert torch.equal(videos.codes, codes)
    with torch.inference_mode():
        assert torch.equal(videos.pixels, to_pixels(tokenizer.decode(codes)))


@pytest.mark.parametrize(("causal", "num_frames"), [(False, 40), (True, 45)])
@pytest.mark.parametrize("overlap_latents", [1, 2, 3])
def test_each_window_goes_on_from_the_one_before_it(causal: bool, num_frames: int, overlap_latents: int) -> None:
    prior, tokenizer, body = make_models(causal)
    length = video_length(body, num_frames, overlap_latents)
    videos = sampled(drawing(prior), tokenizer, length)
    assert videos.codes.shape == (2, length.num_latents, 2, 2)
    assert videos.pixels.shape == (2, num_frames, 8, 8, 3)
    starts = sorted({*range(0, length.num_latents - 4, 4 - overlap_latents), length.num_latents - 4})
    num_known = 0
    for start in starts:
        window = videos.codes[:, start : start + 4]
        again = drawing(prior)(condition=None, prefix=window[:, : num_known - start], first_frame=start)
        assert torch.equal(again, window)
        num_known = start + 4
    assert num_known == length.num_latents


def test_a_prior_of_16_frames_makes_512(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, tokenizer, body = make_models()
    decoded: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda codes: decoded.append(codes.shape[1]) or decode(codes))
    videos = sampled(drawing(prior), tokenizer, video_length(body, 512))
    assert videos.pixels.shape == (2, 512, 8, 8, 3)
    assert set(decoded) == {4}  # no more at once than in the training
    halves = videos.codes.chunk(2, 1)
    assert not torch.equal(*halves)  # fresh noise everywhere


def test_given_latents_may_be_longer_than_the_window() -> None:
    prior, tokenizer, body = make_models()
    prefix = torch.randint(16, (2, 6, 2, 2))
    videos = sampled(drawing(prior), tokenizer, video_length(body, 40, 2), prefix=prefix)
    assert torch.equal(videos.codes[:, :6], prefix)
    window = drawing(prior)(condition=None, prefix=prefix[:, 4:], first_frame=4)
    assert torch.equal(videos.codes[:, 4:8], window)
    with pytest.raises(UserError, match="the given frames fill 6 latent frames, but the video has only 4"):
        sampled(drawing(prior), tokenizer, video_length(body, None), prefix=prefix)


def recorded(prior: Prior, conditions: list[Tensor | None]) -> Any:
    """Draws with a prior and keeps what each window is conditioned on."""

    def draw(*, condition: Tensor | None, prefix: Tensor | None, first_frame: int) -> Tensor:
        conditions.append(condition)
        return drawing(prior)(condition=condition, prefix=prefix, first_frame=first_frame)

    return draw


@pytest.mark.parametrize(("causal", "window", "num_frames"), [(False, 16, 28), (True, 13, 25)])
def test_actions_slide_along(causal: bool, window: int, num_frames: int) -> None:
    prior, tokenizer, body = make_models(causal, (window, 3), condition="actions", condition_by="add")
    actions = torch.randn(2, 30, 3)
    seen: list[Tensor | None] = []
    sampled(recorded(prior, seen), tokenizer, video_length(body, num_frames, 2), condition=actions)
    assert [torch.equal(got, actions[:, first : first + window]) for got, first in zip(seen, (0, 8, 12), strict=True)]
    with pytest.raises(UserError, match=f"cover 20 frames, but the video has {num_frames}; give actions for every"):
        sampled(drawing(prior), tokenizer, video_length(body, num_frames), condition=actions[:, :20])


def test_a_text_stays() -> None:
    prior, tokenizer, body = make_models(condition_shape=(3, 5), condition="text")
    text, seen = torch.randn(2, 3, 5), list[Tensor | None]()
    sampled(recorded(prior, seen), tokenizer, video_length(body, 28, 2), condition=text)
    assert len(seen) == 3
    assert all(each is text for each in seen)


@pytest.mark.parametrize(("causal", "num_frames"), [(False, 28), (True, 25)])
def test_a_prior_that_sees_frames_sees_its_own_later(causal: bool, num_frames: int) -> None:
    prior, tokenizer, body = make_models(causal, (3, 8, 8, 3), condition="frames")
    frames, seen = torch.randint(256, (2, 3, 8, 8, 3), dtype=torch.uint8), list[Tensor | None]()
    length = video_length(body, num_frames, 2)
    videos = sampled(recorded(prior, seen), tokenizer, length, condition=frames)
    assert torch.equal(seen[0], frames)
    with torch.inference_mode():
        first_window = to_pixels(tokenizer.decode(videos.codes[:, :4]))
        second_window = to_pixels(tokenizer.decode(videos.codes[:, 2:6]))
    assert torch.equal(seen[1], first_window[:, 8:11])  # the second window begins at frame 8
    assert torch.equal(seen[2], second_window[:, 4:7])


def test_the_overlap_holds_the_frames_of_the_condition() -> None:
    assert video_length(make_models()[2], 20).overlap_latents == 3
    assert video_length(make_models(condition_shape=(9, 8, 8, 3), condition="frames")[2], 20).overlap_latents == 3
    assert video_length(make_models(True, (6, 8, 8, 3), condition="frames")[2], 17).overlap_latents == 3
    filled = make_models(condition_shape=(13, 8, 8, 3), condition="frames")[2]
    assert video_length(filled, 16).num_latents == 4
    with pytest.raises(UserError, match="of its 4 latent frames, 4 must be known; remove num_frames"):
        video_length(filled, 20)


@pytest.mark.parametrize(
    ("causal", "num_frames", "overlap_latents", "message"),
    [
        (False, 18, None, "num_frames=18: this prior makes 16 frames, or more in steps of 4; set it to 20"),
        (False, 8, None, "num_frames=8: this prior makes 16 frames, or more in steps of 4; set it to 16"),
        (True, 16, None, "num_frames=16: this prior makes 13 frames, or more in steps of 4; set it to 17"),
        (False, 20, 4, "overlap_latents=4: windows of 4 latent frames of this prior can overlap by 1 to 3; remove it"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    causal: bool, num_frames: int, overlap_latents: int | None, message: str
) -> None:
    body = make_models(causal)[2]
    with pytest.raises(UserError, match=message):
        video_length(body, num_frames, overlap_latents)


def test_the_nearest_number_of_frames_is_one_that_is_made() -> None:
    body = make_models(True)[2]
    for wanted in range(1, 40):
        num_frames = nearest_num_frames(body, wanted)
        assert num_frames == next(n for n in range(wanted, 60) if n >= 13 and (n - 13) % 4 == 0)
        assert isinstance(video_length(body, num_frames), VideoLength)
