"""What a user can get wrong: exit 2, one line that says what to do, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipmill import __version__
from clipmill.cli.command import app
from clipmill.cli.help import GUIDES
from clipmill.cli.output import command_line, print_stage
from clipmill.config import load_config
from clipmill.models.export import save_export
from clipmill.models.vqvae import VQVAE
from clipmill.shards.freeze import freeze


def clipmill(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipmill.cli", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("clipmill: ")
    for text in expected:
        assert text in lines[0]


def test_an_unknown_key(tmp_path):
    result = clipmill("shard", "root=run", "data.clip.num_frame=8", cwd=tmp_path)
    assert_refused(result, "unknown key data.clip.num_frame", "num_frames")
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_missing_or_empty(tmp_path):
    result = clipmill("shard", "root=run", "data.source.url=absent", cwd=tmp_path)
    assert_refused(result, str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no video")
    result = clipmill("shard", "root=run", "data.source.url=empty", cwd=tmp_path)
    assert_refused(result, str(tmp_path / "empty"))
    result = clipmill("shard", "root=run", cwd=tmp_path)
    assert_refused(result, "data.source.url")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "first"),
    [
        ("train-vqvae", "clipmill shard"),
        ("tokenize", "clipmill shard"),
        ("train-prior", "clipmill tokenize"),
        ("sample", "clipmill train-prior"),
        ("evaluate", "clipmill"),
        ("report", "clipmill"),
    ],
)
def test_a_stage_before_its_predecessor(tmp_path, stage, first):
    assert_refused(clipmill(stage, "root=run", cwd=tmp_path), first)
    assert not list(tmp_path.iterdir())


def test_a_prior_on_another_tokenizers_tokens(tmp_path):
    config = load_config([], ["root=x", "vqvae.model.hidden_dim=8", "vqvae.model.num_codes=16"])
    model = VQVAE(config.vqvae.model, pixel_variance=0.1)
    sha8 = save_export(str(tmp_path / "run" / "vqvae"), model, {"kind": "vqvae", "pixel_variance": 0.1})
    recipe = {"tokenizer": "00000000", "num_codes": 16, "latent_shape": [1, 4, 4]}
    tokens = tmp_path / "run" / "tokens" / "train"
    _one_shard(tokens)
    freeze(str(tokens), "tokens", [0], recipe, {"classes": []})
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert_refused(clipmill("train-prior", "root=run", cwd=tmp_path), "00000000", sha8, "clipmill tokenize")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def _one_shard(folder: Path) -> None:
    import numpy as np

    from clipmill.shards.commits import commit_unit
    from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes

    staging = folder.parent / "staging"
    staging.mkdir(parents=True)
    writer = UnitWriter(staging, "tokens", 0, 10**6)
    members = {"json": json_bytes({"label": None}), "codes.npy": npy_bytes(np.zeros((1, 4, 4), np.uint8))}
    writer.add(Sample("0" * 16 + "_000000", members))
    commit_unit(str(folder), 0, writer.finish(), {})


def test_a_relative_root_on_a_cluster(tmp_path):
    (tmp_path / "videos").mkdir()
    result = clipmill("shard", "root=run", "data.source.url=videos", cwd=tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert_refused(result, "root run is relative", "absolute path")


def test_the_runs_of_a_mix_are_found_from_the_folder_of_the_command(tmp_path):
    mix = "data.mix=[{url: first, weight: 2}, {url: '${root}'}]"
    alone = clipmill("train-prior", "root=run", mix, cwd=tmp_path)
    assert_refused(alone, f"no tokens at {tmp_path}/first/tokens/train", "run `clipmill tokenize` for that run first")
    on_a_cluster = clipmill("train-prior", f"root={tmp_path}/run", mix, cwd=tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert_refused(on_a_cluster, "data.mix.0.url first is relative", "absolute path")


def test_config_prints_what_a_run_would_use(tmp_path):
    result = clipmill("config", "root=run", "data.crf=30", cwd=tmp_path)
    assert result.returncode == 0
    assert "crf: 30" in result.stdout
    (tmp_path / "again.yaml").write_text(result.stdout)
    again = clipmill("config", "--config", "again.yaml", cwd=tmp_path)
    assert again.stdout == result.stdout


def test_verify_of_nothing(tmp_path):
    assert_refused(clipmill("verify", "nowhere", cwd=tmp_path), "no data set")


def test_the_package_is_the_command(tmp_path):
    command = [sys.executable, "-m", "clipmill", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"clipmill {__version__}\n"


def test_the_help_of_a_stage_shows_its_main_keys_and_an_example():
    for name, guide in GUIDES.items():
        done = CliRunner().invoke(app, [name, "-h"], env={"COLUMNS": "200"})
        assert done.exit_code == 0
        for text in (*guide.keys, guide.example):
            assert text in done.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("clipmill train-", ["train-vqvae", "train-prior"]),
        ("clipmill shard --config dem", ["demo", "demo-wide"]),
        ("clipmill shard --config mine", ["mine/", "mine.yaml"]),
        ("clipmill shard data.clip.res", ["data.clip.resolution=64"]),
        ("clipmill train-vqvae vqvae.model.down", ["vqvae.model.downsample=[4,4,4]"]),
    ],
)
def test_tab_completes_commands_configs_and_keys(tmp_path, monkeypatch, words, expected):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    monkeypatch.chdir(tmp_path)
    shell = {"_CLIPMILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = CliRunner().invoke(app, env=shell, prog_name="clipmill")
    assert done.output.split() == expected


def test_a_stage_ends_with_json_or_for_people_with_paths_and_the_next_command(monkeypatch, capsys):
    summary = {"stage": "shard", "videos": 2400, "psnr": 41.23456, "seconds": 125.0, "versions": {}, "schema": 1}
    next_command = command_line("train-vqvae", ["demo"], ["root=my run"])
    print_stage("shard", summary, "my run/clips", next_command, as_json=False)
    assert json.loads(capsys.readouterr().out) == {key: summary[key] for key in summary if key != "versions"}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_stage("shard", summary, "my run/clips", next_command, as_json=False)
    shown = capsys.readouterr().out
    for text in ("done in 2 min", "2,400", "41.23", "my run/clips", "clipmill train-vqvae --config demo 'root=my run'"):
        assert text in shown
    print_stage("shard", summary, "my run/clips", next_command, as_json=True)
    assert json.loads(capsys.readouterr().out)["videos"] == 2400
