from __future__ import annotations

import pytest

from clipmill.video import Decoder, Limits
from tests.video.conftest import needs_decord
from tests.video.variants import VARIANTS, Variant, check


@pytest.fixture(scope="module")
def decoder():
    with Decoder(Limits(cpu_seconds=300, memory_bytes=4 * 2**30, no_progress_seconds=60)) as shared:
        yield shared


def _named(variants: list[Variant]) -> list:
    return [pytest.param(variant, id=f"{variant.file}-{variant.name}") for variant in variants]


@pytest.mark.parametrize("variant", _named([variant for variant in VARIANTS if variant.fast]))
def test_clips_hold_the_frames_of_the_rule(tmp_path, decoder, variant):
    path = variant.write(tmp_path)
    assert check(decoder, variant, path, "auto") == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", _named(VARIANTS))
def test_clips_hold_the_frames_of_the_rule_in_every_kind_of_file(tmp_path, decoder, variant):
    path = variant.write(tmp_path)
    for choice in ("auto", "pyav"):
        assert check(decoder, variant, path, choice) == []


@needs_decord
@pytest.mark.slow
@pytest.mark.parametrize("variant", _named([variant for variant in VARIANTS if variant.decoder == "decord"]))
def test_clips_hold_the_frames_of_the_rule_by_decord_where_it_is_right(tmp_path, decoder, variant):
    assert check(decoder, variant, variant.write(tmp_path), "decord") == []
