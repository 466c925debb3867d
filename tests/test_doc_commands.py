"""Every `clipmill` command of the documents parses, its keys and configs exist, and every link leads somewhere.

Nothing is run here but the parser: what a command does is tested beside the code that does it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from clipmill.cli.command import app
from clipmill.config import load_config, shipped_configs
from clipmill.errors import UserError

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "benchmarks").glob("*.md")),
]
GROUP = typer.main.get_command(app)
PLACEHOLDERS = {"N": "1", "K": "1", "S": "1"}
"""Arguments that stand for a number."""


def commands(page: Path) -> list[str]:
    """The commands of indented and fenced blocks, and of code in the text."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"(?m)^    (?!    )(.*)$", text) + re.findall(r"(?ms)^```(?:bash|sh|console)?\n(.*?)^```", text)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    # At the start of a line, behind variables or a path; or what `ray job submit` and `torchrun` start.
    start = r"(?:^\s*(?:\w+=\S+ )*(?:\S*/)?|-- |-m )clipmill (?=[a-z])(.*)"
    return [match[1].strip() for line in lines if (match := re.search(start, line))]


def words_of(command: str) -> list[str]:
    """The words of one command, without comment, redirection, the next command or what ``...`` and ``[`` leave open."""
    words = shlex.split(command, comments=True)
    for number, word in enumerate(words):
        if word in ("|", "||", "&&", ";", "&") or word.startswith((">", "2>", "[", "...")):
            words = words[:number]
            break
    else:
        return [PLACEHOLDERS.get(word, word) for word in words]
    if word.startswith("...") and words[-1].startswith("-"):  # the value of an option is left open
        words = words[:-1]
    return [PLACEHOLDERS.get(word, word) for word in words]


ALL = sorted({(page.name, command) for page in PAGES for command in commands(page)})


def test_commands_are_found():
    names = {words_of(command)[0] for _, command in ALL}
    assert {"demo", "init", "run", "shard", "train-prior", "sample", "generate", "verify"} <= names
    assert len(ALL) > 30


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}: {command}"[:80] for page, command in ALL])
def test_a_command_of_the_documents_parses_and_its_keys_exist(page, command):
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "shrad",
        "shard --extent",
        "shard data.clip.num_frame=3",
        "shard data.crf=99",
        "demo --config demi",
        "generate runs/x",
    ],
)
def test_a_wrong_command_would_be_found(command):
    with pytest.raises((AssertionError, UserError, type(usage_error()).__mro__[1])):
        check(command)


def usage_error() -> Exception:
    """The error of a wrong option, by whatever name typer's own click has it."""
    try:
        GROUP.commands["shard"].make_context("shard", ["--nothing"])
    except Exception as error:
        return error
    raise AssertionError


def check(command: str) -> None:
    name, *words = words_of(command)
    assert name in GROUP.commands, f"unknown command: clipmill {command}"
    if not words:  # mentioned by its name alone
        return
    context = GROUP.commands[name].make_context(name, list(words))
    configs = context.params.get("config") or []
    shipped = [file for file in configs if file in shipped_configs()]
    own = [file for file in configs if Path(file).suffix == ".yaml"]
    assert len(shipped) + len(own) == len(configs), f"no config has the name {configs}"
    keys = [word for word in context.params.get("assignments") or () if "..." not in word]
    load_config(shipped or (["demo"] if own else []), ["root=x", *keys])


def test_every_link_leads_to_a_file_and_a_heading():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name} links to {target}, which does not exist"
            if anchor:
                headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
                assert anchor in {_anchor(heading) for heading in headings}, f"{page.name} links to {target}"


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
