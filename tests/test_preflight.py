"""Settings that a later stage would refuse are refused by `shard`, in one line, before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipmill.config import load_config, schema_keys, with_places
from clipmill.errors import UserError
from clipmill.preflight import check_later_stages
from clipmill.stages import _with_absolute_urls, run_stage
from clipmill.video.encode import encode_mp4

TOY = {
    "data.clip.num_frames": "8",
    "data.clip.resolution": "16",
    "vqvae.model.hidden_dim": "8",
    "vqvae.model.num_codes": "16",
    "prior.model.hidden_dim": "16",
    "prior.model.num_layers": "1",
}

PATH_NAMES = {"root", "init_from", "text_embeddings", "fvd_weights", "is_weights", "lpips_weights"}


def config(root: Path, **keys: str):
    values = TOY | {name.replace("__", "."): value for name, value in keys.items()}
    return load_config([], [f"root={root}", *(f"{key}={value}" for key, value in values.items())])


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two videos in folders of classes, and one that lies beside the folders."""
    folder = tmp_path_factory.mktemp("videos")
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    for number, name in enumerate(("cats/a.mp4", "dogs/b.mp4", "stray.mp4")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encode_mp4(frames + np.uint8(number), 8, 30))
    return folder


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"prior__model__class_conditional": "true"},
            r"class_conditional=true needs a class for every video, and 1 of 3 have none, such as stray\.mp4; label",
        ),
        (
            {"prior__model__class_conditional": "true", "data__source__label": "none"},
            r"class_conditional=true needs a class for every video, and 3 of 3 have none",
        ),
        ({"prior__model__condition": "actions"}, "condition=actions needs actions for every video, and 3 of 3"),
        (
            {"prior__model__condition": "text", "tokenize__text_embeddings": "texts"},
            "condition=text needs a text for every video, and 3 of 3",
        ),
        ({"prior__model__condition": "text"}, "condition=text needs tokenize.text_embeddings"),
        (
            {"prior__model__condition": "frames"},
            "condition_frames from 1 to the 8 frames of a clip, not 0",
        ),
        ({"prior__model__condition": "frames", "tokenize__condition_frames": "9"}, "from 1 to the 8 frames of a clip"),
        (
            {"data__clip__resolution": "18"},
            "clips of 8 frames of 18 x 18 pixels do not divide by vqvae",
        ),
        ({"data__clip__num_frames": "9"}, "clips of 9 frames of 16 x 16 pixels do not divide"),
        ({"vqvae__training__random_crop": "32"}, "random_crop=32 is larger than the clips of 16 x 16 pixels"),
        ({"vqvae__model__downsample": "[1,1,1]"}, "compresses nothing"),
        ({"sample__guidance": "2"}, "sample.guidance=2 needs prior.model.label_dropout"),
    ],
)
def test_what_cannot_work_later_fails_at_shard_and_writes_nothing(videos, tmp_path, keys, message):
    run = config(tmp_path / "run", data__source__url=str(videos), **keys)
    with pytest.raises(UserError, match=message) as error:
        run_stage("shard", run)
    assert "\n" not in str(error.value)
    clips = tmp_path / "run" / "clips"
    assert not [path for name in ("plan", "train", "val") for path in (clips / name).rglob("*") if path.is_file()]


def test_relative_paths_do_not_make_sections_count_as_set():
    config = load_config([], ["root=x", "data.source.url=videos", "data.mix=[{url: a}]"])
    absolute = _with_absolute_urls(config)
    assert absolute.root == str(Path.cwd() / "x")
    assert absolute.data.mix[0].url == str(Path.cwd() / "a")
    assert absolute.model_fields_set == {"root", "data"}
    named = load_config([], ["root=x", "tokenize.tokenizer=vqvae", "sample.given=val", "vqvae.training.resume=never"])
    assert _with_absolute_urls(named).model_dump(exclude={"root"}) == named.model_dump(exclude={"root"})


def test_every_key_that_names_a_place_is_marked():
    keys = {key.path for key in schema_keys() if key.path.rpartition(".")[2] in PATH_NAMES}
    values = dict.fromkeys(keys, "some/place")
    assert keys
    found: list[str] = []
    config = load_config([], ["root=some/place", *(f"{key}={value}" for key, value in values.items() if key != "root")])
    with_places(config, lambda key, value: found.append(key) or value)
    assert keys - set(found) == set()


def test_clips_for_others_need_not_fit_the_defaults(tmp_path):
    only_clips = load_config([], ["root=x", "data.clip.num_frames=9", "data.clip.resolution=18"])
    check_later_stages(only_clips)
    with pytest.raises(UserError, match="do not divide"):
        check_later_stages(load_config([], ["root=x", "data.clip.num_frames=9", "prior.model.hidden_dim=64"]))
    mixed = "data.mix=[{url: a}, {url: b}]"
    check_later_stages(load_config([], ["root=x", "data.clip.num_frames=9", "prior.model.hidden_dim=64", mixed]))
