from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from clipmill.config import ClipConfig
from clipmill.errors import UserError
from clipmill.video import Decoder, DecoderLost, Limits, decord_version
from tests.video.conftest import make_video, needs_decord

LIMITS = Limits(cpu_seconds=60, memory_bytes=2 * 2**30, no_progress_seconds=30)
CLIP = ClipConfig(num_frames=8, resolution=32)


@needs_decord
def test_the_installed_distribution_is_named():
    ((name, version),) = decord_version().items()
    assert name in ("decord", "decord2")
    assert version == metadata.version(name)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match=r"install it or set data\.decoder=auto$"):
        decord_version()


def test_a_child_without_the_package_is_no_fault_of_the_video(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("raise ModuleNotFoundError('decord')")
    monkeypatch.syspath_prepend(tmp_path)  # the child gets this path too
    with Decoder(LIMITS) as decoder, pytest.raises(DecoderLost, match="ModuleNotFoundError"):
        list(decoder.clips(make_video(tmp_path / "good.mp4"), CLIP, "decord"))


@pytest.mark.parametrize("choice", ["auto", "pyav", pytest.param("decord", marks=needs_decord)])
def test_decord_is_in_memory_only_where_it_was_asked_for(tmp_path, choice):
    before = set(psutil.Process().children())
    with Decoder(LIMITS) as decoder:
        assert list(decoder.clips(make_video(tmp_path / "good.mp4"), CLIP, choice))
        (child,) = set(psutil.Process().children()) - before
        assert ("libdecord" in Path(f"/proc/{child.pid}/maps").read_text()) == (choice == "decord")
