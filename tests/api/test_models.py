from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipmill
from clipmill import UserError
from clipmill.api.generator import Generator
from clipmill.api.tokenizer import Tokenizer
from clipmill.models.export import load_prior, save_export
from clipmill.models.videogpt import import_videogpt
from clipmill.shards.dataset import ShardDataset, decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.video import decode_mp4
from tests.evaluation.toy_run import HEIGHT, WIDTH, toy_config, write_run
from tests.models.published_frames import NUM_FRAMES, frames_state
from tests.models.test_parity import FIXTURES
from tests.sampling.test_sample import with_model


@pytest.fixture(scope="module")
def generator(run_root: Path) -> Generator:
    return clipmill.load(str(run_root), "generator")


@pytest.fixture(scope="module")
def tokenizer(run_root: Path) -> Tokenizer:
    return clipmill.load(str(run_root), "tokenizer")


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_importing_clipmill_imports_nothing_heavy():
    program = (
        "import sys, clipmill; print([m for m in ('torch', 'numpy', 'pydantic', 'ray', 'av') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
    assert {"load", "open_dataset", "write_video", "UserError"} <= set(dir(clipmill))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        clipmill.lod  # noqa: B018


def test_a_model_is_found_from_run_folder_and_export(run_root: Path, generator: Generator, tokenizer: Tokenizer):
    for url in (run_root, run_root / "prior", run_root / "prior" / "exports" / generator.info.sha8):
        assert clipmill.load(str(url)).info == generator.info
        assert clipmill.load(str(url), "tokenizer").info.sha8 == tokenizer.info.sha8
    assert isinstance(clipmill.load(str(run_root / "vqvae")), Tokenizer)
    assert generator.info.classes == ("down", "left", "up")
    assert (generator.info.num_frames, generator.info.height, generator.info.width) == (8, HEIGHT, WIDTH)
    assert tokenizer.info.codes_shape == (2, 3, 4)
    refused(
        lambda: clipmill.load(str(run_root / "vqvae"), "generator"),
        "vqvae is a tokenizer, which cannot generate videos",
    )
    refused(lambda: clipmill.load(str(run_root / "clips")), "there is no model at .*clips; name the root of a run")


def test_samples_are_those_of_the_stage(run_root: Path, generator: Generator):
    videos, codes = generator.sample(5, batch_size=3)
    assert (videos.shape, videos.dtype) == ((5, 8, HEIGHT, WIDTH, 3), torch.uint8)
    assert (codes.dtype, codes.requires_grad, codes.is_inference(), videos.is_inference()) == (
        torch.int64,
        False,
        False,
        False,
    )
    stored = ShardDataset(Manifest.load(str(run_root / "samples" / "default"), "samples"), decode_codes)
    assert np.array_equal(codes.numpy(), np.stack([stored[index]["codes"] for index in range(5)]))
    assert torch.equal(generator.sample(5, batch_size=3, decoder="parallel").codes, codes)
    later = generator.sample(2, first_index=3, batch_size=2).codes
    assert torch.equal(later, codes[3:])
    assert not torch.equal(generator.sample(5, seed=1).codes, codes)
    told: list[tuple[int, int]] = []
    generator.sample(5, batch_size=2, num_frames=12, decoder="sequential", on_progress=lambda *done: told.append(done))
    assert told[-1] == (5 * 3 * 12, 5 * 3 * 12)  # three latent frames of twelve codes, in two windows
    assert [done for done, _ in told] == [24, 48, 72, 96, 120, 144, 156, 168, 180]  # a latent frame of a batch each


def test_labels_are_checked_by_name(generator: Generator, tmp_path: Path):
    up = generator.sample(2, label="up").codes
    assert torch.equal(generator.sample(2, label=["up", "up"]).codes, up)
    refused(lambda: generator.sample(label="sideways"), "unknown label sideways; this generator knows down, left, up")
    refused(lambda: generator.sample(3, label=["up"]), "1 labels for 3 videos; give one for all, or one for each")
    config = with_model(toy_config(tmp_path / "run"), class_conditional=False)
    write_run(config, tmp_path / "scratch")
    plain = clipmill.load(config.root, "generator")
    refused(lambda: plain.sample(label="up"), "trained without classes; remove label")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature=0: input should be greater than 0"),
        ({"top_p": 2}, "top_p=2: input should be less than or equal to 1"),
        ({"num": 0}, "num_samples=0: input should be greater than 0"),
        (
            {"guidance": 2.0},
            "guidance=2 needs a generator trained with .*dropout above 0; use guidance=1",
        ),
        ({"num_frames": 9}, "this prior makes 8 frames, or more in steps of 4; set it to 12"),
        ({"text": "x.npy"}, "conditioned on nothing; remove text"),
        ({"prefix_latents": 1}, "prefix_latents=1 needs first_frames"),
    ],
)
def test_settings_are_checked_in_words(generator: Generator, settings: dict[str, Any], message: str):
    refused(lambda: generator.sample(**settings), message)


def test_videos_go_on_from_frames(generator: Generator, tokenizer: Tokenizer, tmp_path: Path):
    start = np.random.default_rng(0).integers(0, 256, (4, HEIGHT, WIDTH, 3), dtype=np.uint8)
    codes = generator.sample(2, first_frames=start).codes
    completed = np.concatenate((start, np.repeat(start[-1:], 4, axis=0)))
    assert torch.equal(codes[0, 0], tokenizer.encode(completed)[0])
    assert torch.equal(codes[0, 0], codes[1, 0])
    both = generator.sample(2, first_frames=torch.from_numpy(np.stack((start, start[::-1])))).codes
    assert torch.equal(both[0, 0], codes[0, 0])
    assert torch.equal(both[1, 0], tokenizer.encode(np.concatenate((start[::-1], np.repeat(start[:1], 4, axis=0))))[0])
    Image.fromarray(start[0]).save(tmp_path / "cat.png")
    still = generator.sample(1, first_frames=tmp_path / "cat.png").codes
    assert torch.equal(still[0, 0], tokenizer.encode(np.repeat(start[:1], 8, axis=0))[0])
    (tmp_path / "dog.png").write_text("a dog")
    for frames, message in (
        (start[:3], "first_frames has 3 frames, but this generator needs 4"),
        (
            start[:, :8],
            r"uint8 \[1, 4, 8, 16, 3\], but this generator makes 12 x 16 pixels; resize them",
        ),
        (start / 255, r"first_frames must be uint8, not float64"),
        (
            np.concatenate((start, start)),
            "first_frames give 2 of the video's 2 latent frames, .*at most 4 frames, or raise num_frames",
        ),
        (str(tmp_path / "dog.png"), "dog.png cannot be read: no picture"),
        (str(tmp_path / "none.mp4"), "there is no file .*none.mp4"),
        (np.stack([start] * 3), "first_frames has 3 videos for 2 samples"),
    ):
        refused(lambda frames=frames: generator.sample(2, first_frames=frames), message)


def test_longer_videos_slide_the_window(generator: Generator):
    videos, codes = generator.sample(1, num_frames=16)
    assert (videos.shape[1], codes.shape[1]) == (16, 4)
    assert torch.equal(codes[:, :2], generator.sample(1).codes)
    onward = generator.sample(1, first_frames=videos[0, :8], num_frames=16).codes
    assert torch.equal(onward[:, :2], generator.tokenizer.encode(videos[:, :8]))


def test_a_generator_conditioned_on_actions_takes_them(tmp_path: Path):
    config = with_model(toy_config(tmp_path / "run"), condition="actions", style="modern")
    write_run(config, tmp_path / "scratch")
    generator = clipmill.load(config.root, "generator")
    actions = np.zeros((8, 2))
    np.save(tmp_path / "actions.npy", actions)
    assert torch.equal(
        generator.sample(actions=actions).codes, generator.sample(actions=tmp_path / "actions.npy").codes
    )
    refused(lambda: generator.sample(), r"conditioned on actions; give actions, float \[8, 2\] or a \.npy file")
    refused(
        lambda: generator.sample(actions=actions[:7]), r"has the shape \[7, 2\], the prior takes actions of \[8, 2\]"
    )
    refused(lambda: generator.sample(actions=actions * np.nan), "not finite")
    (tmp_path / "actions.npy").write_text("no")
    refused(lambda: generator.sample(actions=tmp_path / "actions.npy"), r"actions\.npy is no \.npy file")


@pytest.mark.skipif(not (FIXTURES / "vqvae.ckpt").exists(), reason=f"no published checkpoints at {FIXTURES}")
def test_a_published_generator_told_frames_takes_a_picture(tmp_path: Path):
    checkpoint = torch.load(FIXTURES / "prior_uncond.ckpt", weights_only=False)  # safe: it comes with the project
    args = checkpoint["hyper_parameters"]["args"]
    args.n_cond_frames = NUM_FRAMES
    checkpoint["state_dict"] |= frames_state(args)
    torch.save(checkpoint, tmp_path / "prior.ckpt")
    import_videogpt(tmp_path / "prior.ckpt", str(tmp_path / "prior"))
    generator = clipmill.load(str(tmp_path / "prior"), "generator")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.jpg")
    refused(lambda: generator.sample(), "conditioned on 2 frames; give first_frames, such as a picture")
    seen = generator.sample(2, first_frames=tmp_path / "cat.jpg").codes
    other = generator.sample(2, first_frames=np.zeros((2, 16, 16, 3), np.uint8)).codes
    assert seen.shape == other.shape
    assert not torch.equal(seen, other)


def test_logits_that_are_not_finite_are_one_line(run_root: Path, tmp_path: Path):
    prior, tokenizer, body, _ = load_prior(str(run_root / "prior"))
    torch.nn.init.constant_(prior.head.weight, torch.nan)
    save_export(str(tmp_path), prior, {key: body[key] for key in body.keys() - {"sha8"}}, tokenizer)
    refused(lambda: clipmill.load(str(tmp_path), "generator").sample(), "not finite")


def test_a_tokenizer_encodes_and_decodes(tokenizer: Tokenizer, tmp_path: Path):
    videos = np.random.default_rng(0).integers(0, 256, (2, 8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    codes = tokenizer.encode(videos)
    assert (codes.shape, codes.dtype, codes.is_inference()) == ((2, 2, 3, 4), torch.int64, False)
    assert torch.equal(tokenizer.encode(torch.from_numpy(videos[0])), codes[0])
    again = tokenizer.decode(codes.numpy().astype(np.uint8))
    assert (again.shape, again.dtype, again.is_inference()) == ((2, 8, HEIGHT, WIDTH, 3), torch.uint8, False)
    assert torch.equal(tokenizer.decode(codes[1]), again[1])
    clipmill.write_video(tmp_path / "clip.mp4", videos[0])
    assert tokenizer.encode(tmp_path / "clip.mp4").shape == (2, 3, 4)
    assert tokenizer.encode(str(tmp_path / "clip.mp4"), num_frames=4).shape == (1, 3, 4)
    for video, message in (
        (videos[:, :7], "a video of 7 frames of 12 x 16 pixels does not fit: .*a multiple of 4 frames of multiples"),
        (videos.astype(np.float32), "must be uint8, not float32"),
        (videos[0, 0], r"must be uint8 \[T, H, W, 3\] or \[B, T, H, W, 3\], not uint8 \[12, 16, 3\]"),
        ([1, 2], "must be uint8 .* not a list"),
        (tmp_path / "none.mp4", "there is no file"),
    ):
        refused(lambda video=video: tokenizer.encode(video), message)
    refused(lambda: tokenizer.encode(tmp_path / "clip.mp4", num_frames=12), "clip.mp4 is too short: .* 12 frames")
    for wrong, message in (
        (codes + 16, "codes must be from 0 to 15, not"),
        (codes.float(), r"codes must be integers \[t, h, w\].* not float32"),
        (codes[0, 0], r"codes must be integers \[t, h, w\].* not int64 \[3, 4\]"),
    ):
        refused(lambda wrong=wrong: tokenizer.decode(wrong), message)


def test_videos_are_written_as_they_are_and_in_a_grid(tmp_path: Path):
    videos = np.random.default_rng(0).integers(0, 256, (3, 4, 140, 130, 3), dtype=np.uint8)
    clipmill.write_video(tmp_path / "one.mp4", videos[0], fps=5)
    clipmill.write_video(tmp_path / "grid.mp4", torch.from_numpy(videos))
    assert decode_mp4((tmp_path / "one.mp4").read_bytes()).shape == (4, 140, 130, 3)
    assert decode_mp4((tmp_path / "grid.mp4").read_bytes()).shape == (4, 2 * 140 + 4, 2 * 130 + 4, 3)
    refused(lambda: clipmill.write_video(tmp_path / "odd.mp4", videos[0, :, 1:]), "not 139 x 130; pad the video")
    assert not (tmp_path / "odd.mp4").exists()
