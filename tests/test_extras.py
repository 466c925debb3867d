"""Extras are parts of the plain install; commands need those that the table says; a missing one is named."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clipmill.extras import EXTRAS, requirements
from clipmill.stages import STAGES

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
MODULES = {name: [stage.module_name] for name, stage in STAGES.items()} | {
    "generate": ["clipmill.api.command"],
    "init": ["clipmill.init"],
    "verify": ["clipmill.shards.verify", "clipmill.shards.prune"],
    "config": ["clipmill.config"],
    "estimate": ["clipmill.training.estimate"],
    "import-videogpt": ["clipmill.models.videogpt"],
    "export": ["clipmill.training.vqvae", "clipmill.training.prior"],
    "submit": ["clipmill.cluster.jobs"],
}


def names_of(lines: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in lines}


def test_the_plain_install_has_what_the_extras_have():
    for name in EXTRAS:
        assert set(PROJECT["optional-dependencies"][name]) <= set(PROJECT["dependencies"]), name


def test_each_module_comes_with_its_extra():
    distributions = importlib.metadata.packages_distributions()
    for name, modules in EXTRAS.items():
        packages = names_of(PROJECT["optional-dependencies"][name])
        for module in modules:
            found = {each.lower() for each in distributions.get(module.partition(".")[0], [])}
            assert found & packages or module == "decord", (name, module)


def test_requirements_are_those_of_the_core_and_of_the_named_parts(monkeypatch):
    lines = [*PROJECT["dependencies"]]
    for name, extra in PROJECT["optional-dependencies"].items():
        for line in extra:
            requirement, _, marker = line.partition(";")
            condition = f"({marker.strip()}) and " if " and " in marker else f"{marker.strip()} and " if marker else ""
            lines.append(f'{requirement}; {condition}extra == "{name}"')
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    core = names_of(requirements([]))
    assert {"typer", "pydantic", "webdataset", "s3fs"} <= core
    assert not core & {"torch", "ray", "av", "matplotlib", "pytest"}
    assert names_of(requirements(["train"])) - core == {"torch", "deepspeed", "safetensors", "tensorboard"}
    assert names_of(requirements(list(EXTRAS))) == names_of(PROJECT["dependencies"])
    for line in requirements(["sources"]):
        assert "extra" not in line
        assert not line.endswith(";")
    with pytest.raises(ValueError, match="unknown extra nothing; known: sources, cluster, train, report"):
        requirements(["nothing"])


def table() -> dict[str, set[str]]:
    """Extras by command, as docs/install.md says."""
    rows = re.findall(r"(?m)^\| (`.+?`) \| (.+?) \|$", (REPOSITORY / "docs" / "install.md").read_text())
    return {
        command: set(re.findall(r"`(\w+)`", extras.partition(", and ")[0]))
        for commands, extras in rows
        for command in re.findall(r"`([\w-]+)`", commands)
    }


def test_each_command_needs_the_extras_of_the_table():
    program = """
import importlib, os, sys
for line in sys.stdin.read().splitlines():
    command, hidden, modules = line.split("|")
    if pid := os.fork():
        if os.waitpid(pid, 0)[1]:
            print("failed:", command)
        continue
    sys.modules.update({name: None for name in hidden.split(",") if name})
    for module in modules.split(","):
        importlib.import_module(module)
    os._exit(0)
"""
    found = table()
    assert found.keys() == MODULES.keys()
    lines = []
    for command, modules in MODULES.items():
        hidden = {module for name in EXTRAS.keys() - found[command] for module in EXTRAS[name]}
        hidden -= {"google.protobuf"}  # tensorboard brings it too
        lines.append(f"{command}|{','.join(hidden)}|{','.join(modules)}")
    done = subprocess.run([sys.executable, "-c", program], input="\n".join(lines), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("hidden", "arguments", "extra"),
    [
        ("torch", ["estimate", "--gpus", "1", "--config", "demo"], "train"),
        ("jinja2", ["report", "root=run"], "report"),
        ("pyarrow", ["shard", "root=run", "data.source.url=."], "sources"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, hidden, arguments, extra):
    program = f"import sys; sys.modules[{hidden!r}] = None; from clipmill.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"clipmill: this needs the package {hidden}; install the extra: pip install 'clipmill[{extra}]'\n"
    )


def test_python_says_so_too():
    program = "import sys; sys.modules['torch'] = None; import clipmill; clipmill.load('x')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "UserError: this needs the package torch" in done.stderr
