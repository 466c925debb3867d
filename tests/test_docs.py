"""The Python of the README and of docs/ runs, and says the truth about our files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze
from clipmill.video import decode_mjpeg, decode_mp4, encode_mjpeg, encode_mp4
from tests.video.test_encode import moving_disc

REPOSITORY = Path(__file__).parents[1]
README, FORMATS = REPOSITORY / "README.md", REPOSITORY / "docs" / "formats.md"
NOT_RUN = {"lpips": "its weights are downloaded", "torch, torchvision": "so are those of VGG-16"}

CODES = np.arange(8, dtype="u1").reshape(2, 2, 2)
ACTIONS = np.linspace(0, 1, 32, dtype=np.float32).reshape(16, 2)
TEXT = np.ones((3, 4), np.float32)
ABOUT = {"label": "disc", "text": None}


def snippets(document: Path) -> list[str]:
    """The indented blocks that begin with an import."""
    blocks = re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", document.read_text())
    return [code for code in map(textwrap.dedent, blocks) if re.match(r"\s*(import|from) ", code)]


def write_clips(folder: Path, scratch: Path, members: dict[str, bytes]) -> Path:
    """A data set of one unit and two samples; its only tar."""
    scratch.mkdir()
    writer = UnitWriter(scratch, "clips", 0, 2**20)
    for ordinal in range(2):
        writer.add(Sample(f"{7:016x}_{ordinal:06d}", {**members, "json": json_bytes(ABOUT)}))
    commit_unit(str(folder), 0, writer.finish(), {})
    freeze(str(folder), "clips", [0], {}, {})
    (tar,) = folder.glob("*.tar")
    return tar


def test_the_readme_reads_clips_to_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = encode_mp4(moving_disc(), 10, 16)
    write_clips(tmp_path / "runs" / "demo" / "clips" / "train", tmp_path / "scratch", {"mp4": clip})
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets(README)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert capsys.readouterr().out.splitlines() == [
        f"{7:016x}_{ordinal:06d} (16, 64, 64, 3) disc" for ordinal in range(2)
    ]
    for sample in names["dataset"]:
        np.testing.assert_array_equal(sample["video"], decode_mp4(clip))


@pytest.fixture
def members() -> dict[str, tuple[bytes, Any]]:
    """Content by the documented name, and what its row must read out of it."""
    clip = moving_disc()
    mp4, mkv = encode_mp4(clip, 10, 16), encode_mjpeg(clip, 10, 95)
    arrays = {"npy": clip, "codes.npy": CODES, "actions.npy": ACTIONS, "frames.npy": clip[:2], "text.npy": TEXT}
    return {
        "mp4": (mp4, decode_mp4(mp4)),
        "mkv": (mkv, decode_mjpeg(mkv)),
        "json": (json_bytes(ABOUT), ABOUT),
        **{name: (npy_bytes(values), values) for name, values in arrays.items()},
    }


def rows() -> dict[str, str]:
    """The expression that reads each file, by its documented name."""
    return dict(re.findall(r"(?m)^\| `(?:\{key\}\.)?(\S+)`.*? \| `(.+?)` \|", section()))


def section() -> str:
    _, _, rest = FORMATS.read_text().partition("## Reading the members without clipmill")
    return rest.partition("\n## ")[0]


def test_the_formats_page_reads_every_member(members: dict[str, tuple[bytes, Any]]) -> None:
    (snippet,) = snippets(FORMATS)
    names: dict[str, Any] = {}
    exec(snippet, names)
    expressions = rows()
    assert members.keys() <= expressions.keys()
    for name, (data, expected) in members.items():
        found = eval(expressions[name], {**names, "data": data})
        if name == "mkv":
            assert np.abs(found.astype(int) - expected).max() <= 3
        elif isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype
        else:
            assert found == expected


def test_the_formats_page_reads_the_files_beside_the_members(tmp_path: Path) -> None:
    (snippet,) = snippets(FORMATS)
    names: dict[str, Any] = {}
    exec(snippet, names)
    tar = write_clips(tmp_path / "clips", tmp_path / "scratch", {"npy": npy_bytes(moving_disc())})
    expressions = rows()
    offsets = eval(expressions["NAME.tar.idx"], {**names, "path": f"{tar}.idx"})
    with tarfile.open(tar) as archive:
        assert [member.offset for member in archive][::2] == offsets[:-1].tolist()
    assert eval(expressions["shards.txt"], {"path": tar.parent / "shards.txt"}) == [tar.name]
    read_json = expressions["wids.json"]
    for path in (tar.parent / "wids.json", tar.parent / "manifest.json", *tar.parent.glob("commits/*.json")):
        assert eval(read_json, {**names, "path": path}) == json.loads(path.read_text())


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_ffmpeg_commands_of_the_formats_page_give_our_pixels(
    tmp_path: Path, members: dict[str, tuple[bytes, Any]], suffix: str
) -> None:
    data, expected = members[suffix]
    (tmp_path / f"clip.{suffix}").write_bytes(data)
    (tmp_path / "frames").mkdir()
    (command,) = re.findall(rf"`(ffmpeg -i clip\.{suffix} .+?)`", section())
    subprocess.run([*shlex.split(command), "-v", "error"], cwd=tmp_path, check=True)
    found = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())]
    np.testing.assert_array_equal(np.stack(found), expected)


def test_no_python_of_the_documents_goes_unrun() -> None:
    documents = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
    found = {(document.name, code) for document in documents for code in snippets(document)}
    run = {(document.name, code) for document in (README, FORMATS) for code in snippets(document)}
    left = found - run
    assert all(any(f"import {name}" in code for name in NOT_RUN) for _, code in left), left
    assert len(left) == len(NOT_RUN)


def test_the_design_names_tests_and_benchmarks_that_exist() -> None:
    design = (REPOSITORY / "docs" / "design.md").read_text()
    paths = re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", design)
    assert len(paths) > 20
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
