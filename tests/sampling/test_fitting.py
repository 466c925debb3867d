from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from clipmill.config import SampleConfig
from clipmill.sampling.fitting import batch_size_for, draw_some, most_at_once
from clipmill.sampling.long import Batch, sample_videos, video_length
from clipmill.sampling.settings import decoder_for
from tests.sampling.test_long import make_models

CONDITIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "frames": {"condition": "frames", "condition_shape": (1, 8, 8, 3)},
    "actions": {"condition": "actions", "condition_shape": (16, 2), "condition_dropout": 0.1},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_trial_draws_the_last_latent_frame_and_decodes_the_window(
    condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, tokenizer, body = make_models(**CONDITIONS[condition])
    decoded: list[tuple[int, ...]] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda codes: decoded.append(tuple(codes.shape)) or decode(codes))
    settings = SampleConfig(guidance=2.0 if prior.guidable else 1.0)
    draw_some(settings, prior, tokenizer, video_length(body, None), 3)
    assert decoded == [(3, 4, 2, 2)]


def test_the_batch_size_is_the_one_that_is_set_or_that_of_a_cpu() -> None:
    prior, tokenizer, body = make_models()
    length = video_length(body, None)
    for batch_size, found in ((5, 5), (None, 16)):
        assert batch_size_for(SampleConfig(batch_size=batch_size), prior, tokenizer, length) == found
    assert [most_at_once(SampleConfig(), use_gpu) for use_gpu in (False, True)] == [16, 256]


def test_the_faster_decoder_is_taken_where_none_is_set() -> None:
    assert [decoder_for("auto", *case) for case in ((1, "cpu"), (16, "cpu"), (1, "cuda"))] == [
        "parallel",
        "sequential",
        "sequential",
    ]
    assert decoder_for("parallel", 16, "cuda") == "parallel"


def test_a_batch_is_decoded_while_the_next_is_drawn() -> None:
    """The second draw waits until the first batch is being finished, in another thread."""
    _, tokenizer, body = make_models()
    finishing, order = threading.Event(), []

    def draw(number: int) -> Any:
        def window(**keys: Any) -> torch.Tensor:
            if number:
                assert finishing.wait(60)
            return torch.full((1, 4, 2, 2), number)

        return window

    def finish(number: int, videos: Any) -> int:
        finishing.set()
        order.append((number, int(videos.codes.max()), threading.current_thread() is threading.main_thread()))
        return number

    batches = [Batch(draw(number)) for number in range(3)]
    assert list(sample_videos(batches, tokenizer, video_length(body, None), finish)) == [0, 1, 2]
    assert order == [(0, 0, False), (1, 1, False), (2, 2, False)]
