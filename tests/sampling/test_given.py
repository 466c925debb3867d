"""Samples that go on from files: no data set is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.models.export import load_prior
from clipmill.models.videogpt import import_videogpt
from clipmill.models.vqvae import to_input
from clipmill.sampling import sample
from clipmill.sampling.files import list_files
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.video import write_raw_video
from tests.evaluation.toy_run import HEIGHT, WIDTH, make_samples, toy_config, write_run
from tests.models.published_frames import NUM_FRAMES, frames_state
from tests.models.test_parity import FIXTURES
from tests.sampling.test_sample import run, with_model


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def video(path: Path, num_frames: int, seed: int = 0) -> np.ndarray:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_raw_video(path, frames, 8)
    return frames


def samples_of(config: RunConfig) -> list[dict]:
    manifest = Manifest.load(sample.folder_url(config), "samples")
    return list(ShardDataset(manifest, lambda members: {**decode_clip(members), **decode_codes(members)}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_run(toy_config(root), tmp_path_factory.mktemp("scratch"))
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A root that holds a prior and nothing else."""
    shutil.copytree(whole / "prior", tmp_path / "run" / "prior")
    return tmp_path / "run"


def first_latent(root: Path, frames: np.ndarray) -> np.ndarray:
    """By the tokenizer, of a whole clip."""
    _, tokenizer, _, _ = load_prior(str(root / "prior"))
    with torch.inference_mode():
        return tokenizer.encode(to_input(torch.from_numpy(frames[None])))[0, :1].numpy()


def test_a_folder_of_pictures_and_videos_gives_first_latents(root: Path, tmp_path: Path):
    folder = tmp_path / "given"
    folder.mkdir()
    still = picture(folder / "a.png")
    moving = video(folder / "b.nut", 8)
    short = video(folder / "c.nut", 5, seed=1)
    (folder / "notes.txt").write_text("no video")
    config = toy_config(root, prefix_latents=1, given=str(folder), num_samples=4)
    make_samples(config)
    made = samples_of(config)
    assert [each["meta"]["given"] for each in made] == ["a.png", "b.nut", "c.nut", "a.png"]
    completed = np.concatenate((short[:4], np.repeat(short[3:4], 4, axis=0)))
    for each, frames in zip(made, (np.repeat(still[None], 8, axis=0), moving, completed), strict=False):
        assert np.array_equal(each["codes"][:1], first_latent(root, frames))
    assert not np.array_equal(made[0]["codes"], made[3]["codes"])  # other noise, another class
    assert [each["label"] for each in made] == ["down", "left", "up", "down"]
    picture(folder / "a.png", seed=5)
    with pytest.raises(UserError, match=r"given .*another sample\.name"):
        sample.is_finished(config)


def test_a_table_names_frames_and_classes(root: Path, tmp_path: Path):
    for number in range(2):
        picture(tmp_path / f"{number}.png", number)
    table = tmp_path / "given.csv"
    table.write_text(f"url,label\n1.png,up\n{tmp_path}/0.png,left\n")
    config = toy_config(root, prefix_latents=1, given=str(table), num_samples=3)
    make_samples(config)
    made = samples_of(config)
    assert [(each["meta"]["given"], each["label"]) for each in made[:2]] == [
        ("1.png", "up"),
        (f"{tmp_path}/0.png", "left"),
    ]
    table.write_text("url,label\n1.png,sideways\n")
    with pytest.raises(UserError, match=r"1\.png of sample\.given has class sideways, but the prior knows down, left"):
        make_samples(toy_config(root, prefix_latents=1, given=str(table), name="b"))
    table.write_text("url,label\n9.png,up\n")
    with pytest.raises(UserError, match=r"there is no file .*9\.png"):
        run(toy_config(root, prefix_latents=1, given=str(table), name="b"))


def test_actions_come_from_files(tmp_path: Path):
    config = with_model(toy_config(tmp_path / "run", num_samples=3), condition="actions", style="modern")
    write_run(config, tmp_path / "scratch")
    folder = tmp_path / "given"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", np.full((8, 2), number, np.float64))
    files = config.model_copy(update={"sample": config.sample.model_copy(update={"given": str(folder), "name": "b"})})
    for each in (config, files):
        make_samples(each)
    # The clips of the toy run have the same actions and these classes.
    assert [each["codes"].tolist() for each in samples_of(files)] == [
        each["codes"].tolist() for each in samples_of(config)
    ]
    np.save(folder / "1.npy", np.zeros((7, 2)))
    with pytest.raises(UserError, match=r"1\.npy has the shape \[7, 2\], the prior takes actions of \[8, 2\]"):
        make_samples(files.model_copy(update={"sample": files.sample.model_copy(update={"name": "c"})}))


@pytest.mark.parametrize("name", ["cat.png", "CAT.PNG", "two.parts.Jpg"])
def test_actions_beside_frames_are_found_whatever_the_case_of_the_ending(tmp_path: Path, name: str):
    picture(tmp_path / name)
    array = tmp_path / f"{name.rpartition('.')[0]}.actions.npy"
    np.save(array, np.zeros((4, 2), np.float32))
    for url in (tmp_path, tmp_path / name):
        [found] = list_files(str(url), "actions", 1).files
        assert (found.name, found.array) == (name, str(array))


def test_what_cannot_be_given_is_one_line(root: Path, tmp_path: Path):
    (tmp_path / "cat.png").write_text("a cat")
    video(tmp_path / "short.nut", 3)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name, message in (
        ("cat.png", r"cat\.png cannot be read: no picture that can be read: cannot identify image file"),
        ("short.nut", r"short\.nut is too short: the model needs 4 frames"),
        ("empty", r"empty holds no video or picture"),
        ("array.npy", r"array\.npy at .* has no video or picture"),
        ("missing.mp4", r"there is no file .*missing\.mp4"),
        ("nothing", r"there is nothing at .*nothing; name tokens, a file"),
        ("val", r"no tokens at .*/tokens/val .*set sample\.given to other tokens, or to a video"),
    ):
        given = name if name == "val" else str(tmp_path / name)
        with pytest.raises(UserError, match=message) as caught:
            make_samples(toy_config(root, prefix_latents=1, given=given))
        assert "\n" not in str(caught.value)
    assert not (root / "samples").exists()


@pytest.mark.skipif(not (FIXTURES / "vqvae.ckpt").exists(), reason=f"no published checkpoints at {FIXTURES}")
def test_a_published_prior_told_frames_samples_from_a_picture(tmp_path: Path):
    checkpoint = torch.load(FIXTURES / "prior_class.ckpt", weights_only=False)  # safe: it comes with the project
    args = checkpoint["hyper_parameters"]["args"]
    args.n_cond_frames = NUM_FRAMES
    checkpoint["state_dict"] |= frames_state(args)
    torch.save(checkpoint, tmp_path / "prior.ckpt")
    import_videogpt(tmp_path / "prior.ckpt", str(tmp_path / "run" / "prior"))
    made = []
    for seed in range(2):
        picture(tmp_path / "cat.jpg", seed, (48, 32))
        config = toy_config(tmp_path / "run", given=str(tmp_path / "cat.jpg"), num_samples=2, name=f"seed{seed}")
        make_samples(config)
        made.append(samples_of(config))
    assert made[0][0]["video"].shape == (args.sequence_length, args.resolution, args.resolution, 3)
    assert [each["label"] for each in made[0]] == ["0", "1"]
    assert any(
        not np.array_equal(a["codes"], b["codes"]) for a, b in zip(*made, strict=True)
    )  # it looks at the picture
