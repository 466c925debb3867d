"""What `train-prior` refuses before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.shards.manifest import SCHEMA
from clipmill.training import inputs, prior
from tests.evaluation.toy_run import toy_config, write_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(toy_config(folder), tmp_path_factory.mktemp("scratch"))
    (folder / "prior" / "exports" / "latest.json").unlink()  # of another identity than the tests ask for
    return folder


def config_of(root: Path, **model: Any) -> RunConfig:
    config = toy_config(root)
    keys = type(config.prior.model).model_validate({**config.prior.model.model_dump(), **model})
    return config.model_copy(update={"prior": config.prior.model_copy(update={"model": keys})})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"condition": "text"}, r"only 0 of the 9 clips at .*/tokens/train have text; .*tokenize\.text_embeddings"),
        ({"condition": "frames"}, r"only 0 of the 9 clips .* have frames; .*tokenize\.condition_frames=1"),
    ],
)
def test_conditions_that_the_tokens_lack(root: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prior.is_finished(config_of(root, **model))
    assert "\n" not in str(caught.value)


def test_conditions_that_the_tokens_have(root: Path) -> None:
    assert not prior.is_finished(config_of(root, condition="actions"))


def test_some_clips_without_a_class_and_conditions_of_several_shapes(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", condition="actions")
    write_run(config, tmp_path / "scratch")
    url = storage.join(config.folder("tokens", "val"), "manifest.json")
    document = storage.read_document(url, SCHEMA)
    document.pop("schema")
    facts = document["facts"]["fields"]
    facts["actions"]["shapes"] = [[8, 3]]
    storage.publish_document(url, document, SCHEMA)
    with pytest.raises(UserError, match=r"differ in shape: \[8, 2\], \[8, 3\]"):
        prior.is_finished(config)
    facts["label"]["clips"] = 6
    storage.publish_document(url, document, SCHEMA)
    with pytest.raises(UserError, match=r"only 6 of the 7 clips at .*/val have label; label every video"):
        prior.is_finished(config)


def test_codes_out_of_range_name_the_clip_and_the_numbers() -> None:
    codes = torch.zeros(2, 2, 4, 4, dtype=torch.int64)
    prior._check_codes({"codes": codes, "key": ["a", "b"]}, 16, "the/tokens")
    codes[1, 0, 0, 0] = 16
    with pytest.raises(UserError, match="clip b at the/tokens has codes from 0 to 16, but the tokenizer makes 0 to 15"):
        prior._check_codes({"codes": codes, "key": ["a", "b"]}, 16, "the/tokens")


def test_a_condition_that_is_not_finite_names_the_clip() -> None:
    condition = torch.zeros(2, 8, 3)
    prior._check_condition(condition, ["a", "b"], "actions at x")
    condition[1, 7, 2] = torch.nan
    with pytest.raises(UserError, match="clip b has actions at x that are not finite"):
        prior._check_condition(condition, ["a", "b"], "actions at x")


def test_batches_that_do_not_go_up_name_the_numbers(root: Path) -> None:
    training = toy_config(root).prior.training.model_copy(update={"global_batch": 2})
    with pytest.raises(UserError, match=r"global_batch=2 leaves some of the 3 ranks without a clip"):
        inputs.require_rows(training, 3, "prior")
    with pytest.raises(ValueError, match="micro_batch 8 exceeds global_batch 4"):
        type(training)(global_batch=4, micro_batch=8)
