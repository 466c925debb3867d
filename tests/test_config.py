from __future__ import annotations

from pathlib import Path

import pytest

from clipmill.config import ClipConfig, RunConfig, changed_keys, fingerprint, frame_size, identity, load_config
from clipmill.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_validate(path):
    base = [path.with_name("bair.yaml")] if path.stem == "gpu" else []  # settings of a GPU, over a config of the paper
    assert load_config([*base, path]).root.startswith("runs/")


def test_files_merge_left_to_right_and_assignments_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("root: here\nseed: 1\ndata: {crf: 20, clip: {num_frames: 8}}\n")
    second.write_text("seed: 2\ndata: {clip: {resolution: 32}}\n")
    config = load_config([first, second], ["data.crf=30", "vqvae.model.downsample=[2,4,4]"])
    assert (config.seed, config.data.crf, config.data.clip.num_frames, config.data.clip.resolution) == (2, 30, 8, 32)
    assert config.vqvae.model.downsample == (2, 4, 4)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("data.cilp.num_frames=8", "unknown key data.cilp (known here: source, mix, exclude, clip,"),
        ("nonsense=1", "unknown key nonsense"),
        ("data.clip.num_frames=0", "data.clip.num_frames"),
        ("vqvae.model.downsample=[3,4,4]", "powers of two"),
        ("prior.model.num_heads=5", "must be a multiple of num_heads 5"),
        ("sample.name=a/b", "plain folder name"),
        ("no_equals_sign", "write section.key=value"),
        ("seed=[", "seed"),
        ("data.clip.resolution=[36]", "data.clip.resolution: Value error, must be a number of pixels such as 64, or"),
        ("data.clip.resolution=[36,64,3]", "or [height, width] such as [36, 64] (got [36, 64, 3])"),
        ("data.clip.resolution=[36,0]", "data.clip.resolution"),
        ("data.clip.resolution=wide", "data.clip.resolution"),
        ("data.clip.resolution=[36,63]", "clips of 36 x 63 pixels cannot be format=mp4"),
        ("data.clip.resolution=33", "set clip.resolution to even numbers, or format=npy"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(assignment, expected):
    with pytest.raises(UserError) as error:
        load_config([], ["root=here", assignment])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_resolution_is_a_square_or_height_and_width(tmp_path):
    wide = load_config([], ["root=here", "data.clip.resolution=[36,64]"]).data.clip
    assert (wide.resolution, wide.size) == ((36, 64), (36, 64))
    square = load_config([], ["root=here", "data.clip.resolution=[48,48]"]).data.clip
    assert (square.resolution, square.size) == (48, (48, 48))
    assert [frame_size(identity(clip)["resolution"]) for clip in (wide, square)] == [(36, 64), (48, 48)]
    assert fingerprint(identity(square)) == fingerprint(identity(ClipConfig(resolution=48)))
    file = tmp_path / "wide.yaml"
    file.write_text("root: here\ndata: {format: npy, clip: {resolution: [35, 63]}}\n")
    assert load_config([file]).data.clip.size == (35, 63)
    assert load_config([file], ["data.clip.resolution=32"]).data.clip.size == (32, 32)


def test_a_missing_root_and_a_missing_file_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="root is required"):
        load_config([])
    with pytest.raises(UserError, match="does not exist"):
        load_config([tmp_path / "absent.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("root: [")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config([broken])


def test_identity_leaves_out_free_keys_at_every_depth():
    config = RunConfig(root="here")
    keys = identity(config)
    assert "root" not in keys
    assert "url" not in keys["data"]["source"]
    assert "steps" not in keys["vqvae"]["training"]
    assert "global_batch" in keys["vqvae"]["training"]
    assert keys["cluster"] == {}


def test_changed_keys_name_section_and_both_values():
    old = identity(RunConfig(root="here"))
    new = identity(load_config([], ["root=there", "data.clip.num_frames=8"]))
    assert changed_keys(old, new) == ["data.clip.num_frames (16 -> 8)"]
    assert fingerprint(old) != fingerprint(new)
    assert fingerprint(old) == fingerprint(identity(RunConfig(root="elsewhere")))


def test_each_training_section_keeps_its_own_learning_rate_when_another_key_is_set():
    config = load_config([], ["root=here", "vqvae.training.steps=10", "prior.training.steps=10"])
    assert (config.vqvae.training.lr, config.prior.training.lr) == (7e-4, 3e-4)


def test_classes_may_be_named_by_numbers():
    assert load_config([], ["root=here", "sample.classes=[0, 3]"]).sample.classes == ["0", "3"]
