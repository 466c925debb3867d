"""The reference, the JSON schema, suggestions and help texts follow the schema of the configuration."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from clipmill.cli.help import GUIDES
from clipmill.config import RunConfig, json_schema, load_config, markdown, schema_keys, shipped_configs
from clipmill.config.reference import suggest_key
from clipmill.errors import UserError

REPOSITORY = Path(__file__).parents[1]


def test_the_pages_are_current():
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == markdown(), "run `make docs`"
    assert json.loads((REPOSITORY / "docs" / "config.schema.json").read_text()) == json_schema(), "run `make docs`"


def test_every_key_is_described_once_and_its_default_is_the_schemas():
    config = RunConfig(root="here").model_dump(mode="json")
    found = {}
    for key in schema_keys():
        assert key.description, f"{key.path} has no docstring"
        value = config
        for name in key.path.split("."):
            value = value[name]
        assert not key.has_default or value == key.default, key.path
        found[key.path] = key
    assert len(found) == len(schema_keys())
    assert not found["root"].has_default
    assert found["data.clip.resolution"].kind == "integer or list of 2: integer"
    assert found["cluster.use_gpu"].is_free
    assert not found["data.crf"].is_free


def test_the_json_schema_takes_the_shipped_configs_and_refuses_what_clipmill_refuses():
    validator = jsonschema.Draft202012Validator(json_schema())
    for name in shipped_configs():
        validator.validate(yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text()))
    for wrong in ({"data": {"clip": {"num_frame": 16}}}, {"data": {"crf": 99}}, {"vqvae": {"steps": 5}}):
        assert not validator.is_valid(wrong)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("data.cilp", "data.clip"),
        ("data.clip.num_frame", "data.clip.num_frames"),
        ("clip.num_frames", "data.clip.num_frames"),
        ("frame_stride", "data.clip.frame_stride"),
        ("vqvae.steps", "vqvae.training.steps"),
        ("vqae", "vqvae"),
        ("prior.model.n_layers", "prior.model.num_layers"),
        ("data.mix.0.wieght", "data.mix[].weight"),
        ("nonsense", None),
        ("prior.training.learning_rate", None),
    ],
)
def test_an_unknown_key_is_told_what_was_meant(wrong, meant):
    assert suggest_key(wrong) == meant


def test_the_suggestion_is_in_the_message(tmp_path):
    with pytest.raises(UserError, match=r"unknown key vqvae\.steps .*, did you mean vqvae\.training\.steps\?"):
        load_config([], ["root=x", "vqvae.steps=3"])
    with pytest.raises(UserError, match=r"config file bare does not exist.*; did you mean bair\?"):
        load_config(["bare"])
    with pytest.raises(UserError, match=r"no shipped config has that name \(shipped: bair, demo, "):
        load_config(["nothing-like-it"])


def test_a_shipped_config_has_a_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["bair", "ablations/codes-256"]).vqvae.model.num_codes == 256
    Path("bair").write_text("root: mine\n")
    assert load_config(["bair"]).root == "mine"


def test_guides_name_keys_that_exist_and_examples_that_parse():
    known = {key.path for key in schema_keys()}
    for name, guide in GUIDES.items():
        assert set(guide.keys) <= known, name
        command, stage, *words = guide.example.split()
        assert (command, stage) == ("clipmill", name)
        files = [after for word, after in itertools.pairwise(words) if word == "--config"]
        assert load_config(files, [word for word in words if "=" in word]).root
