"""The habits of CONTRIBUTING.md that ruff has no rule for. Run by `make lint`.

- No function of the package is longer than 60 lines, no Python file longer than 400.
- No riddles in names: the field has words for them (`NAMES`).
- No riddles in docstrings and comments (`PHRASES`).

`tools/exceptions.toml` lists what was there before the rule, by file. An exception that is not needed any more is a
failure too, so the list only shrinks.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 400

NAMES = {
    "Told": "conditioning",
    "Mix": "a convolution by its own name, or a mixture of data sets",
    "widen": "up_projection",
    "narrow": "down_projection",
    "left_out": "skipped",
    "remade": "recomputed",
    "Elders": "planned videos",
    "homeless_since": "no_room_since",
    "roomy": "has_memory",
}
"""Names that nobody may define, and the words to use."""

PHRASES = {
    r"\bso many\b": "say the number's name",
    r"\bso long\b": "say the number's name",
    r"\bwhat of it\b": "name it",
    r"\b(is|are) told\b": "the model is conditioned on it; the user reads it",
    r"\bcomes to\b": "is",
    r"\bleft out\b": "skipped, dropped or omitted",
    r"\b(made again|remade)\b": "recomputed, or rebuilt",
    r"\banew\b": "again, or rebuilt",
    r"\bwhoever\b": "name who it is",
    r"\bthe same of\b": "the same for",
    r"\b(goes|go) on\b": "continue",
    r"\b(is|are) away\b": "is unreachable",
    r"\b(one|once|rows?|each) an? (actor|batch|clip|frame|line|node|rank|step|unit)\b": "per",
    r"\b(cannot|can|could|could not) be had\b": "read, or fetched",
    r"\bbelongs? to nobody\b": "is an orphan",
    r"\bwhose fault\b": "the cause",
    r"\bsome \d[\d,]* ": "about",
    r"\bby way of\b": "through",
    r"\bwhat (becomes|became|has become) of\b": "the result of",
}
"""Phrases of docstrings and comments that have to be read twice, and what to write."""


def main() -> None:
    """Prints each breach as ``path:line: what``; exit status 1 if there is one."""
    exceptions = tomllib.loads((REPOSITORY / "tools" / "exceptions.toml").read_text())
    found = {kind: Counter[str]() for kind in ("function", "file", "name", "phrase")}
    lines: list[tuple[str, str, str]] = []
    for folder in ("clipmill", "tests", "benchmarks", "tools"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            place = str(path.relative_to(REPOSITORY))
            for kind, number, what in _breaches(path.read_text(), is_package=folder == "clipmill"):
                found[kind][place] += 1
                lines.append((kind, place, f"{place}:{number}: {what}"))
    problems = []
    for kind, counts in found.items():
        allowed = exceptions.get(kind, {})
        problems += [line for of, place, line in lines if of == kind and counts[place] > allowed.get(place, 0)]
        problems += [
            f"tools/exceptions.toml: {kind}: {place} has {counts[place]} now; lower its exception from {number}"
            for place, number in allowed.items()
            if counts[place] < number
        ]
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(bool(problems))


def _breaches(source: str, is_package: bool) -> Iterator[tuple[str, int, str]]:
    """(kind, line, what) of one file."""
    num_lines = source.count("\n")
    if num_lines > MOST_FILE_LINES:
        yield "file", 1, f"{num_lines} lines; split it at an idea ({MOST_FILE_LINES} are the most)"
    if not is_package:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                yield "function", node.lineno, f"{node.name} has {length} lines; name its steps"
        for name in _defined(node):
            if name.lstrip("_") in NAMES:
                yield "name", getattr(node, "lineno", 1), f"{name}: say {NAMES[name.lstrip('_')]}"
    for number, text in _prose(source):
        for phrase, advice in PHRASES.items():
            if match := re.search(phrase, text, re.IGNORECASE):
                yield "phrase", number, f'"{match[0]}": {advice}'


def _defined(node: ast.AST) -> list[str]:
    """Names that a node defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return []


def _prose(source: str) -> Iterator[tuple[int, str]]:
    """The lines of comments, and of strings of three quotes."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
        elif token.type == tokenize.STRING and token.string.endswith('"""'):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


if __name__ == "__main__":
    main()
