from __future__ import annotations

import pytest

from clipmill.config import EvaluateConfig, RunConfig
from clipmill.errors import UserError
from clipmill.evaluation import evaluate
from clipmill.evaluation.inputs import Inputs
from clipmill.evaluation.protocols import PROTOCOLS, Protocol, protocol_section
from tests.evaluation.toy_run import HEIGHT, Unleased, metrics_of


def asking(config: RunConfig, **settings: object) -> RunConfig:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"name": "protocol", **settings})})


def test_everything_that_a_run_does_not_meet_is_named_in_one_line(config: RunConfig):
    with pytest.raises(UserError) as refusal:
        evaluate.is_finished(asking(config, protocol="bair-256"))
    message = str(refusal.value)
    for part in (
        "data.clip.num_frames is 8, not 16",
        f"data.clip.resolution is ({HEIGHT}, 16), not (64, 64)",
        "given frames of the samples is 0, not 1",
        "there are 7 real clips, not 256",
        "there are 5 samples, not 256",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"fixes 256 clips; remove evaluate\.max_clips"):
        evaluate.is_finished(asking(config, protocol="bair-256", max_clips=4))


def test_a_protocol_fixes_split_and_number_and_is_recorded(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    toy = Protocol(4, HEIGHT, "train", {}, "toy", num_frames=8)
    monkeypatch.setitem(PROTOCOLS, "tats-2048", toy)
    monkeypatch.setattr("clipmill.evaluation.protocols.frame_size", lambda resolution: (HEIGHT, HEIGHT))
    asked = asking(config, protocol="tats-2048")
    evaluate.run(asked, Unleased(evaluate.folder_url(asked), 1))
    metrics = metrics_of(asked)
    assert metrics["protocol"]["name"] == "tats-2048"
    assert (metrics["clips"]["split"], metrics["clips"]["num_clips"], metrics["samples"]["count"]) == ("train", 4, 4)
    assert Inputs.load(asked).clips.url.endswith("clips/train")


@pytest.mark.parametrize(
    ("protocol", "used", "status"),
    [
        ("styleganv-2048-16f", PROTOCOLS["styleganv-2048-16f"].networks["fvd"].sha256, "the protocol's own file"),
        ("styleganv-2048-16f", "0" * 64, "another file than the protocol's i3d_torchscript.pt"),
        ("bair-256", "0" * 64, "no hash of i3d_pretrained_400.pt is publicly stated"),
        ("larp-10k", None, "not measured"),
    ],
)
def test_the_network_file_is_named(protocol: str, used: str | None, status: str):
    section = protocol_section(EvaluateConfig.model_validate({"protocol": protocol}), {"fvd": used})
    assert section is not None
    network = section["networks"]["fvd"]
    assert status in network["status"]
    assert network["used_sha256"] == used
    assert section.keys() >= {"num_clips", "num_frames", "resolution", "fps", "fit", "split", "given_frames"}
